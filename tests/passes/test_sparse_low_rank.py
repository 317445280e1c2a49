"""Thin products plus scattered numbers: gradients, memory, first values, training, plain weights again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from effc.compiler.blocks.sparse_low_rank_linear import SparseLowRankLinear, built, scattered
from effc.compiler.cost import count
from effc.compiler.exporter import inexpressible, stored_tensors
from effc.compiler.method import Batch, Context
from effc.compiler.model import Model
from effc.compiler.op_graph import evaluate, expand
from effc.compiler.probe import difference, probe
from effc.passes.adapt.full import Full
from effc.passes.quantize.rtn import RTN
from effc.passes.reparam.dense import Dense
from effc.passes.reparam.low_rank import LowRank
from effc.passes.reparam.sparse_low_rank import SparseLowRank
from effc.passes.tie.recursive import Recursive
from effc.runtime.fit import fit
from effc.runtime.models.load import Load
from effc.runtime.models.new import New
from effc.runtime.parts.train.optimizer.adamw import AdamW
from effc.runtime.smaller import smaller
from effc.runtime.stage import run_stage
from effc.specs.recipe import Ref

from .tiny_models import Sequences, blank, filled, on_meta, outputs

IDS = torch.arange(36).view(3, 12)
CODE = Ref("code")


def made(method: Any, model: Model, seed: int = 1) -> Model:
    return run_stage(method, [model], Context(seed=seed)).model


def unit(o: int = 12, i: int = 20, rank: int = 3, density: float = 0.1, bias: bool = True) -> Any:
    """A filled unit in float64."""
    made = SparseLowRankLinear(
        in_features=i, out_features=o, rank=rank, density=density, alpha=6.0, bias=bias, dtype="float64"
    )
    dice = torch.Generator().manual_seed(3)
    for name, tensor in list(made.named_parameters()):
        drawn = torch.randn(tensor.shape, generator=dice, dtype=torch.float64)
        setattr(made, name, torch.nn.Parameter(drawn))
    made.places = scattered(len(made.places), o * i, dice).int()
    return made


def on_dense(one: Any, x: Tensor) -> Tensor:
    """The same by plain differentiable torch: W made dense, then multiplied."""
    low = one.factor * (one.b @ one.a)
    w = low.flatten().index_add(0, one.places, one.values).view_as(low)
    return F.linear(x, w, one.bias)


class Again(Sequences):
    """The same sequences in every pass."""

    def batch(self, split: str, indices: Sequence[int]) -> Batch:
        return super().batch(split, [i % self.size(split) for i in indices])


def test_gradients_are_those_of_the_dense_weight() -> None:
    one = unit()
    x = torch.randn(2, 5, 20, dtype=torch.float64, requires_grad=True)
    due = torch.randn(2, 5, 12, dtype=torch.float64)
    wanted = [one.a, one.b, one.values, one.bias, x]
    mine = torch.autograd.grad((one(x) * due).sum(), wanted)
    theirs = torch.autograd.grad((on_dense(one, x) * due).sum(), wanted)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda v: one(v), (x,))


def test_nothing_but_x_and_the_stored_numbers_is_kept_for_the_gradient() -> None:
    one = unit(o=64, i=48)
    x = torch.randn(4, 48, dtype=torch.float64, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        one(x)
    assert max(t.numel() for t in kept) < 64 * 48
    assert {tuple(t.shape) for t in kept} == {(4, 48), (3, 48), (64, 3), (307,)}


def test_the_expansion_is_the_forward() -> None:
    one = unit()
    x = torch.randn(2, 5, 20, dtype=torch.float64)
    model = filled(blank(layers=1))
    got, _ = evaluate(expand(one), one, x, model.step(torch.zeros(2, 5, dtype=torch.long)))
    torch.testing.assert_close(got, one(x))
    torch.testing.assert_close(F.linear(x, one.dense(), one.bias), one(x))


@pytest.mark.parametrize(("count_", "size"), [(1, 10), (9, 10), (30, 1000), (500, 1000)])
def test_places_differ_and_are_drawn_evenly(count_: int, size: int) -> None:
    hits = torch.zeros(size)
    for seed in range(40):
        found = scattered(count_, size, torch.Generator().manual_seed(seed))
        assert len(found) == count_
        assert torch.equal(found, found.unique())
        assert torch.equal(found, scattered(count_, size, torch.Generator().manual_seed(seed)))
        hits[found] += 1
    assert float(hits[: size // 2].sum()) == pytest.approx(20 * count_, abs=4 * (10 * count_) ** 0.5 + 1)


def test_from_scratch_as_the_paper_starts(tiny: Model) -> None:
    model = made(SparseLowRank(rank=4, density=0.1), tiny)
    one: Any = model.module("layers.2.mlp.down")
    assert not bool(one.b.any())
    assert float(one.a.abs().max()) <= 48**-0.5
    assert float(one.values.abs().max()) <= 48**-0.5
    assert len(one.places) == 153
    assert torch.equal(one.places, one.places.unique())
    other: Any = model.module("layers.3.mlp.down")
    assert not torch.equal(one.places, other.places)
    again: Any = made(SparseLowRank(rank=4, density=0.1), tiny, seed=9).module("layers.2.mlp.down")
    assert torch.equal(one.places, again.places), "places follow from `seed` of the method"
    moved: Any = made(SparseLowRank(rank=4, density=0.1, seed=5), tiny).module("layers.2.mlp.down")
    assert not torch.equal(one.places, moved.places)


def test_sizes_are_those_of_the_formula(tiny: Model) -> None:
    rank, base = 3, count(tiny)
    shapes = [tuple(tiny.module(p).weight.shape) for p in tiny.paths("mlp") + tiny.paths("attention")]
    numbers = [rank * (o + i) + int(0.05 * o * i) for o, i in shapes]
    places = [int(0.05 * o * i) for o, i in shapes]
    for index, size in (("int32", 4), ("int64", 8)):
        cost = count(made(SparseLowRank.model_validate({"rank": 3, "density": 0.05, "index": index}), tiny))
        assert base.params - cost.params == sum(o * i for o, i in shapes) - sum(numbers)
        assert cost.bytes == 4 * cost.params + size * sum(places)
        assert cost.flops_per_token == base.flops_per_token


def test_svd_keeps_what_a_product_misses_most(tiny: Model) -> None:
    chosen = ("layers[1].mlp.up",)
    w: Any = tiny.module("layers.1.mlp.up").weight
    methods = [
        SparseLowRank(rank=6, density=0.2, init="svd", select=chosen),
        SparseLowRank(rank=6, density=0.2, init="svd", support="random", select=chosen),
    ]
    missed = []
    for method in methods:
        found: Any = made(method, tiny).module("layers.1.mlp.up")
        rest = w - found.factor * (found.b @ found.a)
        torch.testing.assert_close(found.values, rest.flatten()[found.places.long()])
        missed.append(float((found.dense() - w).norm() / w.norm()))
    assert missed[0] < missed[1] < float(torch.linalg.svdvals(w)[6:].norm() / w.norm()) + 1e-6


def test_a_weight_that_is_such_a_sum_comes_back_exactly(tiny: Model) -> None:
    """A model of thin products plus scattered numbers, written out: the same function."""
    model = made(SparseLowRank(rank=4, density=0.1, init="svd"), tiny)
    plain = made(Dense(), model)
    assert difference(outputs(model, IDS), outputs(plain, IDS)) < 1e-5
    assert probe(Dense(), model, plain).held
    assert count(plain) == count(tiny)
    rows = tuple({"on": f"attention.{name}", "rank": 16} for name in "kv")
    whole = SparseLowRank.model_validate(
        {"rank": 32, "density": 0.01, "init": "svd", "alpha": 1.0, "rules": rows}
    )
    full = made(whole, tiny)
    assert difference(outputs(tiny, IDS), outputs(full, IDS)) < 1e-4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_factors_and_numbers_train_and_places_stay(precision: Any, tiny: Model) -> None:
    model = made(SparseLowRank(rank=4, density=0.1), tiny)
    data = Again(model, 16)
    method = Full(data=CODE, steps=30, batch=8, precision=precision, optimizer=AdamW(lr=1e-2))
    outcome = fit(method, model, Context(data={"data": data}))
    trained: Any = outcome.model.module("layers.2.mlp.down")
    before: Any = model.module("layers.2.mlp.down")
    for name in ("a", "b", "values"):
        assert not torch.equal(getattr(trained, name), getattr(before, name))
    assert torch.equal(trained.places, before.places)
    curve = outcome.measures["curve"]
    assert "loss" in str(outcome.log[-1]), curve
    first, last = (float(word.strip(",")) for word in str(outcome.log[-1]).split() if "." in word)
    assert last < first - 0.2


def test_the_family_takes_it_dense(tiny: Model) -> None:
    model = smaller(Load(path="zoo:pylm").open({}, tiny=True)).materialize()
    thin = made(SparseLowRank(rank=4, density=0.05, init="svd"), model)
    assert any("SparseLowRankLinear" in word for word in inexpressible(thin))
    assert inexpressible(thin, dense=True) == []
    one: Any = thin.module("layers.0.mlp.up")
    written = stored_tensors(thin)["model.layers.0.mlp.up_proj.weight"].read()
    assert torch.equal(written, one.dense().to(written.dtype))


def test_a_small_copy_has_sound_places(tiny: Model) -> None:
    anonymous = Model(tiny.gm)
    copy = smaller(made(SparseLowRank(rank=4), anonymous)).materialize()
    one: Any = copy.module("layers.0.mlp.up")
    assert int(one.places.max()) < one.in_features * one.out_features
    assert torch.equal(one.places, one.places.unique())


def said(method: Any, model: Model) -> tuple[str, str]:
    first = method.refuses(on_meta(model), ())[0]
    return first.code, first.render()


def test_what_cannot_be_split_is_refused(tiny: Model) -> None:
    assert said(SparseLowRank(rank=33), tiny)[0] == "E340"
    assert "use a rank of at most 16" in said(SparseLowRank(rank=33), tiny)[1]
    code, words = said(SparseLowRank(rank=4, density=0.0004), tiny)
    assert (code, "leaves no place" in words) == ("E340", True)
    assert said(SparseLowRank(rank=2, select=("head",)), tiny)[0] == "E341"
    assert said(SparseLowRank(rank=2), made(Recursive(loops=2), tiny))[0] == "E341"
    assert said(SparseLowRank(rank=2), made(RTN(bits=8), tiny))[0] == "E322"
    assert said(SparseLowRank(rank=2), made(LowRank(rank=4), tiny))[0] == "E323"
    assert said(SparseLowRank(rank=2), filled(blank(layers=2, experts=4)))[0] == "E323"
    code, words = said(SparseLowRank(rank=16, density=0.3), tiny)
    assert (code, "saves nothing" in words) == ("W333", True)
    for wrong in ({"density": 0.0}, {"density": 1.0}, {"rank": 0}, {"support": "largest"}):
        with pytest.raises(ValueError, match="validation error"):
            SparseLowRank.model_validate(wrong)


def test_learned_weights_are_not_thrown_away(tiny: Model) -> None:
    fresh = New(architecture="llama", tokenizer="specs/zoo/pylm", layers=2, width=64, hidden=64, heads=2)
    new = fresh.open({})
    assert SparseLowRank(rank=4).refuses(new) == []
    code, words = said(SparseLowRank(rank=4), Load(path="zoo:pylm").open({}, tiny=True))
    assert (code, "init = svd" in words) == ("E327", True)
    method = Full(data=CODE, steps=1, batch=2)
    trained = fit(method, tiny, Context(data={"data": Sequences(tiny)})).model
    assert said(SparseLowRank(rank=4), trained)[0] == "E327"
    assert not [d for d in SparseLowRank(rank=4, init="svd").refuses(trained) if d.severity == "error"]


def test_writing_out_needs_something_to_write(tiny: Model) -> None:
    assert said(Dense(), tiny)[0] == "E320"
    mixed = made(LowRank(rank=4, select=("mlp",)), made(SparseLowRank(rank=3, select=("attention",)), tiny))
    part = made(Dense(select=("attention",)), mixed)
    assert {type(m).__name__ for p, m in part.units() if p.endswith((".q", ".up"))} == {
        "Linear",
        "LowRankLinear",
    }
    assert difference(outputs(mixed, IDS), outputs(part, IDS)) < 1e-5


def test_a_unit_says_what_it_cannot_be() -> None:
    sides: Any = {"in_features": 8, "out_features": 4, "alpha": 1.0}
    with pytest.raises(ValueError, match=r"rank 5 is not in 1\.\.4"):
        SparseLowRankLinear(**sides, rank=5, density=0.1)
    with pytest.raises(ValueError, match="leaves 0 of 32 places"):
        SparseLowRankLinear(**sides, rank=1, density=0.01)
    assert built(torch.ones(1, 3), torch.ones(2, 1), torch.ones(1), torch.tensor([4]), 2.0).tolist() == [
        [2.0, 2.0, 2.0],
        [2.0, 3.0, 2.0],
    ]
