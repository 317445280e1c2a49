"""Adapters that effc trained load in peft and compute the same; what comes back is what went out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from effc.compiler.architecture import architecture
from effc.compiler.blocks import LoraLinear
from effc.compiler.importer import build
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.passes.adapt.lora import Lora
from effc.passes.quantize.rtn import RTN
from effc.runtime.adapter import put_on
from effc.runtime.exports.peft import Peft
from effc.specs.recipe import Ref

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def made(**config: object) -> Model:
    told = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES, **config}
    model = build(architecture("llama"), told)
    dice = torch.Generator().manual_seed(0)
    for name, tensor in model.tensors().items():
        value = torch.randn(tensor.shape, generator=dice) / 6 + ("norm" in name)
        model.place(name, torch.nn.Parameter(value, requires_grad=False))
    return model


def adapted(model: Model, **fields: object) -> Model:
    method = Lora(data=Ref("text"), steps=1, **fields)
    rw = Rewriter(model)
    method.outline(rw, ())
    method.begin(rw, 0)
    out = rw.done()
    dice = torch.Generator().manual_seed(3)
    for name, tensor in out.tensors().items():
        if name.endswith(".b"):
            out.place(name, torch.randn(tensor.shape, generator=dice) / 6)
    return out


def test_peft_computes_the_same(tmp_path: Path) -> None:
    rules = ({"on": "mlp.up", "rank": 2}, {"on": "layers[1].attention.q", "alpha": 3.0})
    model = adapted(made(), rank=4, select=("attention.q", "mlp.*"), rules=rules)
    place = tmp_path / "lora"
    verdict = Peft(path=str(place)).publish(model)
    assert verdict.error < 1e-5
    assert verdict.consumer.startswith("peft")
    config = json.loads((place / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "gate_proj", "q_proj", "up_proj"]
    assert config["rank_pattern"] == {f"model.layers.{i}.mlp.up_proj": 2 for i in range(2)}
    assert config["alpha_pattern"] == {"model.layers.1.self_attn.q_proj": 3.0}


@pytest.mark.claim
def test_peft_computes_the_same_over_packed_weights(tmp_path: Path) -> None:
    rw = Rewriter(made())
    RTN(bits=4, group=16).rewrite(rw)
    Peft(path=str(tmp_path / "lora")).publish(adapted(rw.done(), scaling="sqrt_rank"))


def test_what_goes_out_comes_back(tmp_path: Path) -> None:
    base = made()
    rules = ({"on": "layers[0].mlp.up", "rank": 2}, {"on": "attention.k", "skip": True})
    model = adapted(base, rank=4, scaling="sqrt_rank", rules=rules)
    Peft(path=str(tmp_path)).write(model, tmp_path / "lora")
    again = put_on(tmp_path / "lora", base)
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    assert torch.equal(again.clone().materialize()(ids), model(ids))
    assert not isinstance(again.module("layers.0.attention.k"), LoraLinear)


def test_only_some_layers_are_named_in_full(tmp_path: Path) -> None:
    model = adapted(made(), select=("layers[1].attention.*",))
    Peft(path=str(tmp_path)).write(model, tmp_path / "lora")
    targets = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["target_modules"]
    assert targets == [f"model.layers.1.self_attn.{x}_proj" for x in "koqv"]


def test_what_it_cannot_express_is_named() -> None:
    (none,) = Peft(path="x").refuses(made())
    assert none.code == "E464"
    told = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 61}
    gpt2 = build(architecture("gpt2"), told | {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64})
    rw = Rewriter(gpt2)
    Lora(data=Ref("text"), steps=1, select=("attention.q",)).outline(rw, ())
    (shared,) = Peft(path="x").refuses(rw.done())
    assert shared.code == "E553"
    assert "in one matrix with others" in shared.notes[0]
