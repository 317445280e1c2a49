"""Small copies: what stages changed is still there, everything is narrow, and the copy runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from effc.compiler.architecture import architecture
from effc.compiler.blocks import MoE
from effc.compiler.emitted import emitted
from effc.compiler.exporter import inexpressible
from effc.compiler.importer import build
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.passes.adapt.lora import Lora
from effc.passes.quantize.rtn import RTN
from effc.passes.reparam.low_rank import LowRank
from effc.passes.tie.recursive import Recursive
from effc.runtime import artifact
from effc.runtime.exports._export import probe
from effc.runtime.smaller import HIDDEN, WIDTH, smaller
from effc.specs.recipe import Ref

BASE = {
    "vocab_size": 61,
    "hidden_size": 96,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 16,
}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16, "factor": 2.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": BASE,
    "mixtral": BASE | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "gemma2": BASE | {"sliding_window": 4, "query_pre_attn_scalar": 16},
    "gpt2": {"vocab_size": 61, "n_embd": 96, "n_layer": 4, "n_head": 6, "n_positions": 40},
    "gpt_neox": BASE | {"rotary_pct": 0.25},
    "phi3": BASE | {"head_dim": 32, "rope_scaling": LONG},
    "bert": BASE | {"type_vocab_size": 2},
    "vit": BASE | {"image_size": 12, "patch_size": 4},
}


def meta(name: str, **changes: Any) -> Model:
    return build(architecture(name), {"model_type": name} | CONFIGS[name] | changes)


def runs(model: Model) -> bool:
    with torch.no_grad():
        out = model(probe(model, 2, 9))
    return bool(out.isfinite().all()) and 0.05 < float(out.float().std()) < 50


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_has_a_narrow_copy_that_exports(name: str) -> None:
    model = meta(name)
    small = smaller(model).materialize()
    assert small.layers == model.layers
    assert list(small.roles) == list(model.roles)
    assert small.module("embedding").width == WIDTH
    assert runs(small)
    assert inexpressible(small) == []


def test_experts_become_small() -> None:
    model = meta("mixtral", intermediate_size=14336)
    small = smaller(model)
    for i in range(4):
        moe = small.module(f"layers.{i}.moe")
        assert isinstance(moe, MoE)
        assert (moe.hidden, moe.n_experts, moe.active) == (HIDDEN, 4, 2)
    assert sum(t.numel() for t in small.tensors().values()) < 500_000
    assert emitted(small)["intermediate_size"] == HIDDEN


@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_weights_stay_packed(symmetric: bool) -> None:
    rw = Rewriter(meta("llama"))
    rules = [{"on": "head", "bits": 8}]
    RTN(bits=3, group=16, scheme="symmetric" if symmetric else "asymmetric", rules=rules).outline(rw, ())
    small = smaller(rw.done()).materialize()
    up: Any = small.module("layers.2.mlp.up")
    assert (type(up).__name__, up.bits, up.symmetric) == ("QuantLinear", 3, symmetric)
    assert (up.in_features, up.out_features, WIDTH % up.group) == (WIDTH, HIDDEN, 0)
    assert small.module("head").bits == 8
    assert up.dense().std() * WIDTH**0.5 == pytest.approx(1.0, abs=0.2)
    assert runs(small)


def test_factors_adapters_ties_and_lost_layers_stay() -> None:
    rw = Rewriter(meta("llama"))
    rw.remove_layers([1])
    LowRank(rank=0.25, select=("layers[0].mlp.*",)).outline(rw, ())
    Lora(steps=1, data=Ref("code"), rank=24, select=("layers[1].attention.*",)).outline(rw, ())
    for unit in ("q", "k", "v", "o"):
        rw.tie(f"layers.2.attention.{unit}", f"layers.0.attention.{unit}")
    small = smaller(rw.done()).materialize()
    assert small.layers == 3
    low: Any = small.module("layers.0.mlp.up")
    assert type(low).__name__ == "LowRankLinear"
    assert low.rank < WIDTH
    assert type(small.module("layers.1.attention.q")).__name__ == "LoraLinear"
    assert small.ties()["layers.2.attention.q.weight"] == "layers.0.attention.q.weight"
    assert runs(small)


def test_layers_that_share_weights_still_do() -> None:
    rw = Rewriter(meta("llama"))
    Recursive(loops=2).outline(rw, ())
    before = rw.done()
    small = smaller(before)
    assert small.ties() == before.ties()


def test_widths_that_differ_keep_their_order() -> None:
    from effc.compiler.blocks import MLP

    rw = Rewriter(meta("llama"))
    rw.swap("layers.2.mlp", MLP(width=96, hidden=160))
    small = smaller(rw.done())
    assert [small.module(f"layers.{i}.mlp").hidden for i in range(4)] == [HIDDEN, HIDDEN, HIDDEN // 2, HIDDEN]


def test_an_artefact_has_a_small_copy(tmp_path: Path) -> None:
    model = meta("llama", num_hidden_layers=2)
    for path, tensor in model.tensors().items():
        model.place(path, torch.randn(tensor.shape) * 0.1)
    rw = Rewriter(model)
    RTN(bits=4, group=32).rewrite(rw)
    artifact.write(rw.done(), tmp_path / "model.effc")
    small = smaller(artifact.read(tmp_path / "model.effc")).materialize()
    assert type(small.module("layers.1.attention.k")).__name__ == "QuantLinear"
    assert runs(small)
