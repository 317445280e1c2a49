"""Export: the source's names and config with what stages changed, read again by effc and by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from effc.compiler.architecture import architecture
from effc.compiler.checkpoint import read_folder
from effc.compiler.checkpoint_write import write_folder
from effc.compiler.emitted import emitted
from effc.compiler.exporter import inexpressible, stored_tensors
from effc.compiler.importer import build, import_folder
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.passes.quantize.rtn import RTN

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWED = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 40}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SIZES | {"rope_theta": 10000.0, "torch_dtype": "float32"},
    "mistral": SIZES | {"sliding_window": 5},
    "qwen2": SIZES | WINDOWED,
    "qwen3": SIZES | WINDOWED | {"head_dim": 16, "tie_word_embeddings": True},
    "gemma2": SIZES | {"head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 20},
    "gpt2": GPT2 | {"bos_token_id": 1, "eos_token_id": 2},
    "mixtral": SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "phi3": SIZES | {"sliding_window": 6},
    "gpt_neox": SIZES | {"rotary_pct": 0.25},
    "bert": SIZES | {"type_vocab_size": 2},
}
IDS = torch.randint(3, 61, (2, 12), generator=torch.Generator().manual_seed(0))


def made(name: str, **changes: Any) -> Model:
    """A random model of a family, from its config alone."""
    family = architecture(name)
    config = {"model_type": name, "architectures": [family.classes[0]], "dtype": "float32"}
    model = build(family, config | CONFIGS[name] | changes)
    stream = torch.Generator().manual_seed(1)
    for path, tensor in model.tensors().items():
        model.place(path, torch.randn(tensor.shape, generator=stream) * 0.2 + (tensor.ndim == 1) * 0.8)
    return model


def written(model: Model, folder: Path, limit: int = 10**9) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(emitted(model)))
    write_folder(folder, stored_tensors(model), limit)
    return folder


def theirs(folder: Path) -> Tensor:
    """What transformers computes from the folder."""
    config = transformers.AutoConfig.from_pretrained(folder)
    encoder = config.architectures[0].endswith("BertModel")
    kind = transformers.AutoModel if encoder else transformers.AutoModelForCausalLM
    model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not [k for k in info["missing_keys"] if "pooler" not in k]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        out = model.eval()(input_ids=IDS)
    found: Tensor = out.last_hidden_state if encoder else out.logits
    return found


def close(got: Tensor, want: Tensor) -> bool:
    return bool((got - want).abs().max() / want.abs().max() < 1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_computes_the_same_after_layers_went(name: str, tmp_path: Path) -> None:
    rw = Rewriter(made(name))
    rw.remove_layers([1])
    model = rw.done()
    assert inexpressible(model) == []
    folder = written(model, tmp_path / "out", limit=20_000)
    assert (folder / "model.safetensors.index.json").exists()
    with torch.no_grad():
        want = model(IDS)
        again = import_folder(folder).materialize()
        assert torch.equal(again(IDS), want)
        assert close(theirs(folder), want)


@pytest.mark.parametrize("name", ["gemma2", "qwen2"])
def test_windows_stay_with_their_layers(name: str) -> None:
    model = made(name)
    windows = [model.module(f"layers.{i}.attention").window for i in range(4)]
    rw = Rewriter(model)
    rw.remove_layers([0, 2] if name == "gemma2" else [0])
    kept = windows[1::2] if name == "gemma2" else windows[1:]
    config = emitted(rw.done())
    assert config["layer_types"] == ["sliding_attention" if w else "full_attention" for w in kept]


def test_a_config_changes_where_the_model_did_and_nowhere_else() -> None:
    model = made("llama", house="kept", rope_theta=500.0)
    assert {k: v for k, v in emitted(model).items() if k != "dtype"} == {
        k: v for k, v in model.config.items() if k != "dtype"
    }
    rw = Rewriter(model)
    rw.remove_layers([3])
    config = emitted(rw.done())
    assert {k for k in config if config[k] != model.config.get(k)} == {"num_hidden_layers"}


@pytest.mark.parametrize("tied", [True, False])
def test_heads_stay_tied_or_untied(tied: bool, tmp_path: Path) -> None:
    model = made("llama", tie_word_embeddings=tied)
    folder = written(model, tmp_path / "out")
    assert ("lm_head.weight" in read_folder(folder)) is not tied
    assert bool(import_folder(folder).ties()) is tied
    assert close(theirs(folder), model(IDS).detach())


def test_an_untied_head_is_said_in_the_config() -> None:
    rw = Rewriter(made("llama", tie_word_embeddings=True))
    rw.untie("head")
    assert emitted(rw.done())["tie_word_embeddings"] is False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_keep_their_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model = made("gpt_neox").to(dtype)
    folder = written(model, tmp_path / "out")
    assert {ref.dtype for ref in read_folder(folder).values()} == {dtype}
    again = import_folder(folder).materialize()
    assert all(torch.equal(t, again.tensors()[n]) for n, t in model.tensors().items())


def test_packed_weights_are_refused_by_name_unless_dense_is_asked(tmp_path: Path) -> None:
    rw = Rewriter(made("llama"))
    RTN(bits=4, group=16).rewrite(rw)
    model = rw.done()
    why = " ".join(inexpressible(model))
    assert "layers.0" in why
    assert "QuantLinear" in why
    assert inexpressible(model, dense=True) == []
    folder = written(model, tmp_path / "out")
    with torch.no_grad():
        assert close(theirs(folder), model(IDS))


def test_layers_of_differing_width_are_refused_by_name() -> None:
    from effc.compiler.blocks import MLP

    rw = Rewriter(made("llama"))
    rw.swap("layers.2.mlp", MLP(width=32, hidden=16))
    why = " ".join(inexpressible(rw.model))
    assert "layers.2.mlp" in why
    assert "hidden 16" in why


def test_a_missing_block_is_refused_by_name() -> None:
    rw = Rewriter(made("llama"))
    rw.remove("layers.1.attention")
    assert "layers.1.attention" in " ".join(inexpressible(rw.model))


def test_shared_layers_are_written_for_each(tmp_path: Path) -> None:
    rw = Rewriter(made("llama"))
    for unit in ("q", "k", "v", "o"):
        rw.tie(f"layers.2.attention.{unit}", f"layers.1.attention.{unit}")
    model = rw.done()
    assert inexpressible(model) == []
    with torch.no_grad():
        assert close(theirs(written(model, tmp_path / "out")), model(IDS))
