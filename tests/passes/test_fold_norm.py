"""Gains and biases of norms moved into the matrices behind them: the same function in every family."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from effc.compiler.blocks import Linear, Norm
from effc.compiler.cost import count
from effc.compiler.model import Model
from effc.compiler.readers import read_inside, readers
from effc.compiler.rewrite import Rewriter
from effc.compiler.sharing import tie
from effc.compiler.trace import trace
from effc.passes.adapt.lora import Lora
from effc.passes.quantize.rtn import RTN
from effc.passes.reparam.fold_norm import FoldNorm
from effc.specs.recipe import Ref
from tests.claims import Measured
from tests.compiler.conftest import FAMILIES, fill, inputs

from .edited import edited, moved

FOLDED = {
    "llama": ("norm1", "norm2"),
    "qwen3": ("norm1", "norm2"),
    "gemma2": ("norm1", "norm2"),
    "gpt2": ("norm1", "norm2"),
    "neox": ("norm1", "norm2"),
    "mixtral": ("norm1", "norm2"),
    "vit": ("norm1", "norm2"),
}
"""Family -> norms of a layer that feed matrices alone."""


def codes(method: FoldNorm, model: Model) -> list[str]:
    return [d.code for d in method.refuses(model)]


def gains(model: Model, path: str) -> torch.Tensor:
    norm = model.module(path)
    assert isinstance(norm, Norm)
    return norm.weight + norm.offset


@pytest.mark.parametrize("name", FOLDED)
def test_the_function_stays(name: str) -> None:
    model = fill(FAMILIES[name]())
    method = FoldNorm(tied="untie")
    assert codes(method, model) == []
    x = inputs(model, 3, 9)
    assert moved(method, model, x, torch.float32) < 1e-5
    assert moved(method, model, x, torch.float64) < 1e-9
    after = edited(method, model)
    final = ["norm"] if name != "vit" else []
    for path in [*final, *(f"layers.{i}.{n}" for i in range(model.layers) for n in FOLDED[name])]:
        assert bool((gains(after, path) == 1).all()), path
        assert getattr(after.module(path), "bias", None) is None or not after.module(path).bias.any()


def test_norms_that_meet_the_residual_stream_stay() -> None:
    model = fill(FAMILIES["gemma2"]())
    after = edited(FoldNorm(tied="untie"), model)
    for path in ("layers.0.norm1_post", "layers.1.norm2_post"):
        assert torch.equal(gains(after, path), gains(model, path))
    qk = fill(FAMILIES["qwen3"]())
    path = "layers.0.attention.q_norm"
    assert torch.equal(gains(edited(FoldNorm(), qk), path), gains(qk, path))


def test_columns_are_scaled_and_a_bias_is_made_for_the_head() -> None:
    model = fill(FAMILIES["gpt2"]())
    after = edited(FoldNorm(), model)
    old, new = model.module("head"), after.module("head")
    gain, bias = model.module("norm").weight, model.module("norm").bias
    assert old.bias is None
    assert torch.allclose(new.weight, old.weight * gain, atol=1e-6)
    assert torch.allclose(new.bias, old.weight @ bias, atol=1e-5)
    assert count(after).params == count(model).params + new.bias.numel()


def test_bert_has_no_norm_that_feeds_matrices_alone() -> None:
    (problem,) = FoldNorm().refuses(fill(FAMILIES["bert"]()))
    assert problem.code == "E320"
    assert "`layers.0.norm1` is read by the residual stream" in "\n".join(problem.notes)
    (named,) = FoldNorm(select=("layers[1].norm1",)).refuses(fill(FAMILIES["bert"]()))
    assert "the gain of `layers.1.norm1` cannot be folded" in named.title


def test_a_shared_head_is_refused_left_or_untied() -> None:
    model = fill(FAMILIES["llama"]())
    (problem,) = FoldNorm().refuses(model)
    assert (problem.code, problem.about) == ("E341", "tied")
    assert "head shares its weight" in problem.notes[0]
    kept = edited(FoldNorm(tied="skip"), model)
    assert kept.ties() == model.ties()
    assert torch.equal(gains(kept, "norm"), gains(model, "norm"))
    split = edited(FoldNorm(tied="untie"), model)
    assert split.ties() == {}
    table = model.tensors()["embedding.weight"]
    assert torch.equal(split.tensors()["embedding.weight"], table), "the table itself is not scaled"
    assert count(split).params == count(model).params + table.numel()


def test_gains_that_norms_share_fold_together_or_not_at_all() -> None:
    model = fill(FAMILIES["qwen3"]())
    tie(model.gm, "layers.1.norm1.weight", "layers.0.norm1.weight")
    one = FoldNorm(select=("layers[0].norm1",))
    assert codes(one, model) == ["E341"]
    both = FoldNorm(select=("layers[*].norm1",))
    assert codes(both, model) == []
    assert moved(both, model, inputs(model), torch.float64) < 1e-9


def test_packed_readers_and_adapters_are_named() -> None:
    model = fill(FAMILIES["qwen3"]())
    rw = Rewriter(model)
    RTN(bits=8, select=("mlp",)).rewrite(rw)
    (packed,) = FoldNorm().refuses(rw.done())
    assert packed.code == "E322"
    assert "layers.0.mlp.up" in packed.notes[0] or "layers.0.mlp.gate" in packed.notes[0]
    assert codes(FoldNorm(select=("layers[*].norm1",)), rw.done()) == []
    rw = Rewriter(model)
    Lora(data=Ref("code"), steps=1, rank=2).outline(rw, ())
    (adapted,) = FoldNorm().refuses(rw.done())
    assert adapted.code == "E323"
    assert "LoraLinear" in adapted.notes[0]


def test_experts_cannot_take_a_bias() -> None:
    model = fill(FAMILIES["mixtral"]())
    rw = Rewriter(model)
    rw.swap("layers.0.norm2", Norm(width=32, form="layer", bias=True))
    (problem,) = FoldNorm(select=("layers[0].norm2",)).refuses(fill(rw.done()))
    assert (problem.code, "experts" in problem.notes[0]) == ("E320", True)


class Branches(nn.Module):
    """One norm before two linears and a dropout; another before a linear and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(8), nn.LayerNorm(8)
        self.left, self.right, self.last = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 3)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.first(x)
        y = self.second(self.left(n) + self.right(self.drop(n)))
        out: torch.Tensor = self.last(y) + y.mean(-1, keepdim=True)
        return out


def test_a_traced_module_folds_too() -> None:
    torch.manual_seed(0)
    module = Branches()
    for norm in (module.first, module.second):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = torch.randn(5, 8)
    model = trace(module, x)
    read = readers(model, "first")
    assert (sorted(read.units), read.others) == (["left", "right"], [])
    assert readers(model, "second").others != []
    assert codes(FoldNorm(), model) == []
    assert list(FoldNorm().targets(model)) == ["first"]
    assert moved(FoldNorm(), model, x, torch.float64) < 1e-9


def test_a_reader_that_is_fed_by_others_too_is_no_reader() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n, self.m, self.w = nn.LayerNorm(4), nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.w(self.n(x)) + self.w(self.m(x))
            return out

    model = trace(Shared(), torch.randn(2, 4))
    assert readers(model, "n").others == ["`w`, which other blocks feed as well"]
    assert FoldNorm().refuses(model)[0].code == "E320"


def test_what_a_block_reads_is_found_in_its_ops() -> None:
    model = fill(FAMILIES["mixtral"]())
    assert read_inside(model.module("layers.0.attention")).units == ["q", "k", "v"]
    moe = read_inside(model.module("layers.0.moe"))
    assert (moe.units, moe.others) == (["router", "experts.up", "experts.gate"], [])
    assert read_inside(Linear(in_features=2, out_features=2)).units == [""]
    assert read_inside(Norm(width=2)).others == ["rms_norm"]
    assert read_inside(nn.GELU()).others == ["GELU"]


@pytest.mark.claim
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_folding_norms_is_exact(seed: int, measured: Measured) -> None:
    for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        worst = max(
            moved(FoldNorm(tied="untie"), model, inputs(model, 3, 9, seed), dtype)
            for name in FOLDED
            for model in [fill(FAMILIES[name](), seed)]
        )
        bits = str(dtype).removeprefix("torch.")
        measured("reparam.fold_norm", f"{len(FOLDED)} families move by no more in {bits}", worst, below=limit)
