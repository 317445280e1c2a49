"""Folders as people have them: old keys, shards, half precision, no tokenizer; files beside the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from effc.compiler.blocks import Attention
from effc.compiler.blocks.rope import rotated
from effc.compiler.checkpoint import read_folder
from effc.compiler.emitted import emitted
from effc.compiler.importer import TOKENIZER_FILES, import_folder
from effc.compiler.model import Model
from effc.runtime.exports.hf import Hf

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA = SIZES | {"num_key_value_heads": 2}
IDS = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(0))
BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
SU = {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0]}
OLD: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "theta": ("LlamaForCausalLM", {}, {"rope_theta": 500.0}),
    "linear": (
        "LlamaForCausalLM",
        {},
        {"rope_theta": 5e2, "rope_scaling": {"type": "linear", "factor": 4.0}},
    ),
    "dynamic": (
        "LlamaForCausalLM",
        {"max_position_embeddings": 16},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    ),
    "yarn": (
        "Qwen2ForCausalLM",
        {},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    ),
    "llama3": ("LlamaForCausalLM", {}, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0} | BANDS}),
    "longrope": (
        "Phi3ForCausalLM",
        {"pad_token_id": 0},
        {"rope_scaling": SU, "original_max_position_embeddings": 16},
    ),
    "null": ("MistralForCausalLM", {"sliding_window": None}, {"rope_theta": 1e6, "rope_scaling": None}),
    "neox": ("GPTNeoXForCausalLM", {}, {"rotary_pct": 0.25, "rotary_emb_base": 500}),
    "neox-half": ("GPTNeoXForCausalLM", {}, {"rotary_pct": 0.5, "rotary_emb_base": 10000}),
}


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> None:
    """A random model of transformers, in a folder."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    shard = more.pop("max_shard_size", "1GB")
    own = SIZES if name.startswith("GPTNeoX") else LLAMA
    theirs = cls(cls.config_class(**(own | more)))
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.15)
    theirs.to(dtype).save_pretrained(folder, max_shard_size=shard)


def theirs(folder: Path) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=IDS).logits)


def ours(folder: Path) -> Tensor:
    with torch.no_grad():
        out: Tensor = import_folder(folder).materialize()(IDS)
    return out


def gap(got: Tensor, want: Tensor) -> float:
    assert got.dtype == want.dtype
    return float((got.float() - want.float()).abs().max() / want.float().abs().max())


@pytest.mark.parametrize("form", OLD)
def test_configs_written_before_transformers_5(form: str, tmp_path: Path) -> None:
    name, sizes, old = OLD[form]
    saved(name, tmp_path, **sizes)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for key in ("rope_parameters", "dtype", "head_dim", "layer_types"):
        config.pop(key, None)
    path.write_text(json.dumps(config | {"torch_dtype": "float32"} | old))
    assert gap(ours(tmp_path), theirs(tmp_path)) < 1e-5
    again = emitted(import_folder(tmp_path))
    assert again["torch_dtype"] == "float32"
    assert "rope_parameters" not in again
    assert all(again[key] == value for key, value in old.items())


def test_a_quarter_of_a_head_of_twelve_turns_four_dimensions(tmp_path: Path) -> None:
    saved("GPTNeoXForCausalLM", tmp_path, rotary_pct=0.25)
    attention = import_folder(tmp_path).module("layers.0.attention")
    assert isinstance(attention, Attention)
    assert attention.head_dim == 12
    assert attention.rope is not None
    assert rotated(attention.rope, 12) == 4
    assert gap(ours(tmp_path), theirs(tmp_path)) < 1e-5


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MixtralForCausalLM", "GPTNeoXForCausalLM"])
def test_shards_with_an_index(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    model = import_folder(tmp_path)
    assert model.is_meta
    assert gap(ours(tmp_path), theirs(tmp_path)) < 1e-5


def test_experts_lie_on_disk_one_by_one(tmp_path: Path) -> None:
    saved("MixtralForCausalLM", tmp_path)
    names = read_folder(tmp_path)
    for which, part in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
        stored = [
            names[f"model.layers.1.block_sparse_moe.experts.{e}.{which}.weight"].read() for e in range(8)
        ]
        held = import_folder(tmp_path).weights[f"layers.1.moe.experts.{part}.weight"].read()
        assert torch.equal(held, torch.stack(stored))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3), (torch.float32, 1e-5)]
)
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM", "MixtralForCausalLM"])
def test_half_precision_stays_half(name: str, dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    saved(name, tmp_path, dtype)
    model = import_folder(tmp_path).materialize()
    assert {t.dtype for t in model.tensors().values()} == {dtype}
    assert gap(ours(tmp_path), theirs(tmp_path)) < tolerance


def published(model: Model, place: Path) -> Path:
    Hf(path=str(place)).write(model.clone().materialize(), place)
    return place


def test_a_folder_without_a_tokenizer_is_legal(tmp_path: Path) -> None:
    saved("LlamaForCausalLM", tmp_path / "in")
    (tmp_path / "in" / "generation_config.json").unlink()
    model = import_folder(tmp_path / "in")
    assert model.tokenizer is None
    out = published(model, tmp_path / "out")
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]


def test_what_lies_beside_the_weights_survives_byte_for_byte(tmp_path: Path) -> None:
    saved("LlamaForCausalLM", tmp_path / "in")
    content = {name: f'{{"{name}":  "\u00e9\\r\\n {{% raw %}}"}} \n'.encode() for name in TOKENIZER_FILES}
    for name, text in content.items():
        (tmp_path / "in" / name).write_bytes(text)
    out = published(import_folder(tmp_path / "in"), tmp_path / "out")
    assert {name: (out / name).read_bytes() for name in TOKENIZER_FILES} == content
    assert {"chat_template.jinja", "generation_config.json", "tokenizer_config.json"} <= content.keys()
