"""Adapters that peft wrote compute the same in effc; what effc cannot read is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from effc.compiler.blocks import LoraLinear
from effc.compiler.importer import import_folder
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.passes.adapt.fold import Fold
from effc.passes.quantize.rtn import RTN
from effc.runtime.adapter import put_on
from effc.runtime.consumer import ask
from effc.runtime.models.adapter import Adapter
from effc.specs.diagnostic import EffcError
from effc.specs.recipe import Ref

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": 61,
}
LINEAR = {
    "q_proj": (32, 32),
    "k_proj": (16, 32),
    "v_proj": (16, 32),
    "o_proj": (32, 32),
    "gate_proj": (48, 32),
    "up_proj": (48, 32),
    "down_proj": (32, 48),
}


def dice(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def saved(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    roll = dice()
    tensors = {
        n: torch.randn(s, generator=roll) / 6 + (len(s) == 1 and "bias" not in n) for n, s in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (61, 32),
        "model.norm.weight": (32,),
        "lm_head.weight": (61, 32),
    }
    for i in range(2):
        for name, shape in LINEAR.items():
            block = "self_attn" if shape[0] < 48 and name != "down_proj" else "mlp"
            shapes[f"model.layers.{i}.{block}.{name}.weight"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{name}.weight"] = (32,)
    return saved(tmp_path_factory.mktemp("models") / "llama", LLAMA, shapes)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (61, 32),
        "transformer.wpe.weight": (64, 32),
    }
    for i in range(2):
        sizes = {
            "attn.c_attn": (32, 96),
            "attn.c_proj": (32, 32),
            "mlp.c_fc": (32, 128),
            "mlp.c_proj": (128, 32),
        }
        for name, shape in sizes.items():
            shapes[f"transformer.h.{i}.{name}.weight"] = shape
            shapes[f"transformer.h.{i}.{name}.bias"] = shape[1:]
        for name in ("ln_1", "ln_2"):
            shapes |= {f"transformer.h.{i}.{name}.{slot}": (32,) for slot in ("weight", "bias")}
    shapes |= {f"transformer.ln_f.{slot}": (32,) for slot in ("weight", "bias")}
    return saved(tmp_path_factory.mktemp("models") / "gpt2", GPT2, shapes)


def adapter(folder: Path, factors: Mapping[str, tuple[int, int, int]], **options: Any) -> Path:
    """A folder as peft's save_pretrained writes it; factors: module -> rank, out, in."""
    folder.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "bias": "none"}
    config |= {"target_modules": sorted({name.rpartition(".")[2] for name in factors}), "use_rslora": False}
    (folder / "adapter_config.json").write_text(json.dumps(config | options))
    roll, tensors = dice(7), {}
    for module, (rank, out, inputs) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, inputs, generator=roll) / 5
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out, rank, generator=roll) / 5
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def on_llama(*names: str, rank: int = 4) -> dict[str, tuple[int, int, int]]:
    return {
        f"model.layers.{i}.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}": (rank, *LINEAR[name])
        for i in range(2)
        for name in names
    }


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 61, (2, 9), generator=dice(1))


def logits(model: Model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.clone().materialize()(ids)


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return bool((got - want).abs().max() <= 1e-5 * want.abs().max())


def test_peft_and_effc_compute_the_same(llama: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    factors = on_llama("q_proj", "v_proj", "down_proj") | {"model.layers.0.mlp.up_proj": (2, 48, 32)}
    patterns = {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}}
    folder = adapter(tmp_path / "lora", factors, use_rslora=True, **patterns)
    base = import_folder(llama)
    model = put_on(folder, base)
    want = ask("peft", folder, ids, base=llama).logits
    assert close(logits(model, ids), want)
    assert not close(logits(base, ids), want)
    rw = Rewriter(model.clone().materialize())
    Fold().rewrite(rw)
    assert close(logits(rw.done(), ids), want)


@pytest.mark.claim
def test_a_matrix_of_three_parts_takes_one_adapter(gpt2: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    factors = {f"transformer.h.{i}.attn.c_attn": (4, 96, 32) for i in range(2)}
    folder = adapter(tmp_path / "lora", factors, fan_in_fan_out=True)
    model = put_on(folder, import_folder(gpt2))
    assert isinstance(model.module("layers.1.attention.k"), LoraLinear)
    assert close(logits(model, ids), ask("peft", folder, ids, base=gpt2).logits)


def test_rows_of_a_shared_matrix_go_to_their_parts(gpt2: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "lora", {"transformer.h.0.attn.c_attn": (4, 96, 32)})
    model = put_on(folder, import_folder(gpt2)).materialize()
    stored = load_file(folder / "adapter_model.safetensors")
    b = stored["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"]
    for number, part in enumerate("qkv"):
        unit = model.module(f"layers.0.attention.{part}")
        assert torch.equal(unit.b, b[32 * number : 32 * (number + 1)])
        assert torch.equal(unit.a, stored["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"])


def test_an_adapter_may_lie_over_packed_weights(llama: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    rw = Rewriter(import_folder(llama).materialize())
    RTN(bits=8, group=16).rewrite(rw)
    packed = rw.done()
    folder = adapter(tmp_path / "lora", on_llama("up_proj"))
    assert not close(logits(put_on(folder, packed), ids), logits(packed, ids))


def test_the_source_opens_it_and_a_trial_sketches_it(llama: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    folder = adapter(tmp_path / "lora", on_llama("q_proj"))
    source = Adapter(path=str(folder), on=Ref("base"))
    base = import_folder(llama)
    assert source.open({"base": base}).module("layers.0.attention.q").rank == 4
    trial = source.open({"base": base}, tiny=True)
    assert isinstance(trial.module("layers.0.attention.q"), LoraLinear)
    assert close(logits(trial, ids), logits(base, ids))


def _rename(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.safetensors")


def _config(folder: Path, **options: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


@pytest.mark.parametrize(
    ("spoil", "code", "words"),
    [
        (lambda f: _config(f, use_dora=True), "E461", "`use_dora` is True"),
        (lambda f: _config(f, peft_type="IA3"), "E461", "`peft_type` is IA3"),
        (lambda f: _config(f, bias="all"), "E461", "`bias` is all"),
        (lambda f: _config(f, modules_to_save=["lm_head"]), "E461", "`modules_to_save`"),
        (lambda f: _config(f, init_lora_weights="pissa"), "E461", "`init_lora_weights` is pissa"),
        (lambda f: _config(f, something_new=1), "E461", "`something_new`"),
        (lambda f: _config(f, r=0), "E460", "'r' must be a number above 0"),
        (lambda f: _config(f, lora_alpha="8"), "E460", "'lora_alpha'"),
        (lambda f: _config(f, alpha_pattern={"(a+)+$": 1}), "E460", "regular expression"),
        (lambda f: _config(f, r=3), "E460", "has rank 4, its settings say 3"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "E460", "no table"),
        (lambda f: (f / "adapter_config.json").unlink(), "E414", ""),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\xff" * 40), "E415", ""),
        (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "E417", "pickle"),
        (
            lambda f: _rename(f, lambda t: {k.replace("layers.1", "layers.7"): v for k, v in t.items()}),
            "E462",
            "no such module",
        ),
        (
            lambda f: _rename(f, lambda t: {k: v for k, v in t.items() if "B" not in k or "0" in k}),
            "E462",
            "factor B is missing",
        ),
        (
            lambda f: _rename(f, lambda t: {k: v[:, :-1].contiguous() for k, v in t.items()}),
            "E462",
            "the matrix is",
        ),
        (
            lambda f: _rename(f, lambda t: {k.replace("lora_A", "lora_magnitude"): v for k, v in t.items()}),
            "E460",
            "no factor",
        ),
        (lambda f: _rename(f, lambda t: {}), "E460", "no tensor"),
    ],
)
def test_what_cannot_be_read_is_named(
    llama: Path, tmp_path: Path, spoil: Callable[[Path], object], code: str, words: str
) -> None:
    folder = adapter(tmp_path / "lora", on_llama("q_proj"))
    spoil(folder)
    with pytest.raises(EffcError) as caught:
        put_on(folder, import_folder(llama))
    said = [(item.code, note) for item in caught.value.diagnostics for note in item.notes]
    assert any(found == code and words in note for found, note in said)
