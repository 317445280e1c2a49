"""One array for many matrices: where weights lie, gradients, first values, training, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from effc.compiler.blocks.hashed_linear import HashedLinear, loads, mixed, signs, where
from effc.compiler.cost import count
from effc.compiler.exporter import inexpressible
from effc.compiler.method import Batch, Context
from effc.compiler.model import Model
from effc.compiler.op_graph import evaluate, expand
from effc.compiler.probe import difference
from effc.passes.adapt.full import Full
from effc.passes.quantize.rtn import RTN
from effc.passes.reparam.dense import Dense
from effc.passes.reparam.hashed import Hashed
from effc.passes.tie.recursive import Recursive
from effc.runtime.fit import fit
from effc.runtime.parts.train.optimizer.adamw import AdamW
from effc.runtime.smaller import smaller
from effc.runtime.stage import run_stage
from effc.specs.recipe import Ref

from .tiny_models import Sequences, blank, filled, on_meta, outputs

CODE, IDS = Ref("code"), torch.arange(36).view(3, 12)
FOLD: Any = "random_fold"


def made(method: Any, model: Model) -> Model:
    return run_stage(method, [model], Context(seed=1)).model


class Again(Sequences):
    """The same sequences in every pass."""

    def batch(self, split: str, indices: Sequence[int]) -> Batch:
        return super().batch(split, [i % self.size(split) for i in indices])


def test_hashes_are_the_same_everywhere() -> None:
    """Numbers of this very function: another would read another model from the same file."""
    assert mixed(torch.arange(4), 0).tolist() == mixed(torch.arange(4), 0).tolist()
    assert mixed(torch.tensor([0, 1, 2, 10**12]), 7).tolist() == [
        mixed_by_hand(n, 7) for n in (0, 1, 2, 10**12)
    ]
    found = mixed(torch.arange(20000), 3)
    assert len(found.unique()) > 19990
    assert int(found.min()) >= 0
    assert abs(float(signs(0, 20000, 5).float().mean())) < 0.03


def mixed_by_hand(x: int, seed: int) -> int:
    """The same in integers without bounds."""
    h = x + seed * 0x9E3779B1 + 0x7F4A7C15
    for by in (0x2C1B3C6D, 0x297A2D39):
        h = ((h ^ ((h >> 15) & 0x7FFFFFFF)) * by) & 0x7FFFFFFFFFFFFFF
        h ^= h >> 29
    return (h ^ (h >> 17)) & 0x7FFFFFFF


@pytest.mark.parametrize(("weights", "slots"), [(1000, 1000), (1000, 100), (1000, 333), (77, 76)])
def test_loads_of_slots_differ_by_one_at_most(weights: int, slots: int) -> None:
    load = torch.bincount(where(0, weights, slots, FOLD, 64, 3), minlength=slots)
    assert int(load.max() - load.min()) <= 1
    assert set(load.tolist()) <= {weights // slots, -(-weights // slots)}
    halves = torch.cat([where(0, 40, slots, FOLD, 64, 3), where(40, weights - 40, slots, FOLD, 64, 3)])
    assert torch.equal(halves, where(0, weights, slots, FOLD, 64, 3))


def test_chunks_lie_together() -> None:
    h = where(0, 640, 100, "roast", 32, 1).view(-1, 32)
    assert torch.equal(h - h[:, :1], torch.arange(32).expand(20, 32))
    assert int(h.max()) < 100
    assert len(h[:, 0].unique()) > 5


def unit(grad_scale: Any = "none", kind: str = "float64") -> Any:
    one: Any = HashedLinear(
        in_features=6, out_features=5, slots=13, matrices=2, number=1, fold=1, offset=3, bias=True,
        grad_scale=grad_scale, dtype=kind,
    )  # fmt: skip
    dice = torch.Generator().manual_seed(0)
    for name in ("pool", "bias"):
        old = getattr(one, name)
        drawn = torch.randn(old.shape, generator=dice, dtype=old.dtype)
        setattr(one, name, torch.nn.Parameter(drawn))
    one.scales, one.ends = torch.tensor([2.0, 0.5]), torch.tensor([16, 46])
    return one


def by_index(one: Any) -> Tensor:
    """W by plain differentiable indexing."""
    h, sign = where(16, 30, 13, FOLD, 64, 0), signs(16, 30, 0)
    w: Tensor = (one.pool[h] * sign * 0.5).view(5, 6)
    return w


def test_gradients_add_up_over_what_a_slot_serves() -> None:
    one, x = unit(), torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(one(x), F.linear(x, by_index(one), one.bias))
    torch.testing.assert_close(one.dense(), by_index(one))
    mine = torch.autograd.grad(one(x).square().sum(), [one.pool, one.bias])
    theirs = torch.autograd.grad(F.linear(x, by_index(one), one.bias).square().sum(), [one.pool, one.bias])
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)
    load = torch.zeros(13, dtype=torch.float64)
    load.index_add_(0, where(0, 16, 13, FOLD, 64, 0), torch.full((16,), 4.0, dtype=torch.float64))
    load.index_add_(0, where(16, 30, 13, FOLD, 64, 0), torch.full((30,), 0.25, dtype=torch.float64))
    torch.testing.assert_close(loads((16, 46), (2.0, 0.5), 13, FOLD, 64, 0), load.float())
    scaled = unit("v1")
    (found,) = torch.autograd.grad(scaled(x).square().sum(), [scaled.pool])
    torch.testing.assert_close(found, mine[0] / load)


def test_the_expansion_is_the_forward() -> None:
    one = unit(kind="float32")
    x = torch.randn(2, 5, 6)
    step = filled(blank(layers=1)).step(torch.zeros(2, 5, dtype=torch.long))
    got, _ = evaluate(expand(one), one, x, step)
    torch.testing.assert_close(got, one(x))


def test_one_array_is_stored_once(tiny: Model) -> None:
    base, dense = count(tiny), sum(
        tiny.module(p).weight.numel() for p in tiny.paths("mlp") + tiny.paths("attention")
    )  # fmt: skip
    small = made(Hashed(keep=0.1), tiny)
    assert count(small).params == base.params - dense + dense // 10
    assert count(small).bytes == 4 * count(small).params + 42 * (4 + 8)
    assert count(small).flops_per_token == base.flops_per_token
    first, last = (small.module(f"layers.{n}.mlp.up") for n in (0, 5))
    assert first.pool is last.pool
    each = made(Hashed(keep=0.25, scope="layer"), tiny)
    assert count(each).params == base.params - dense + dense // 4
    assert first.scales[first.number] * small.module("layers.0.mlp.up").pool.std() == pytest.approx(
        float(tiny.module("layers.0.mlp.up").weight.std()), rel=0.05
    )


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_an_array_of_all_weights_is_the_model(scope: Any, tiny: Model) -> None:
    whole = made(Hashed(keep=1.0, init="project", scope=scope), tiny)
    assert difference(outputs(tiny, IDS), outputs(whole, IDS)) < 1e-5
    plain = made(Dense(), whole)
    assert difference(outputs(whole, IDS), outputs(plain, IDS)) < 1e-6
    assert count(plain) == count(tiny)
    errors = [
        run_stage(Hashed(keep=keep, init="project", scope=scope), [tiny], Context()).measures["errors"]
        for keep in (0.8, 0.3)
    ]
    assert 0.1 < max(errors[0].values()) < max(errors[1].values()) < 1


@pytest.mark.parametrize("mapping", ["random_fold", "roast"])
def test_the_array_trains(mapping: Any, tiny: Model) -> None:
    model = made(Hashed(keep=0.3, mapping=mapping, chunk=32), tiny)
    method = Full(data=CODE, steps=30, batch=8, precision="fp32", optimizer=AdamW(lr=5e-3))
    outcome = fit(method, model, Context(data={"data": Again(model, 16)}))
    after: Any = outcome.model.module("layers.2.mlp.down")
    before: Any = model.module("layers.2.mlp.down")
    assert not torch.equal(after.pool, before.pool)
    assert after.pool is outcome.model.module("layers.4.mlp.up").pool
    first, last = (float(word.strip(",")) for word in str(outcome.log[-1]).split() if "." in word)
    assert last < first - 0.2


@pytest.mark.parametrize("grad_scale", ["v1", "none"])
def test_scaled_gradients_do_not_see_the_deviation_of_the_array(grad_scale: Any, tiny: Model) -> None:
    """A step of plain descent moves the weights of two arrays ten apart alike, if and only if scaled."""
    moved = []
    for spread in (0.1, 1.0):
        model = made(Hashed(keep=0.5, grad_scale=grad_scale, spread=spread, seed=4), tiny)
        one: Any = model.module("layers.1.mlp.up")
        before = one.dense().detach()
        one.pool.requires_grad_()
        model(IDS).square().mean().backward()
        one.pool.data -= 0.1 * one.pool.grad
        moved.append(float((one.dense().detach() - before).norm()))
    ratio = moved[0] / moved[1]
    assert ratio == pytest.approx(1.0 if grad_scale == "v1" else 100.0, rel=1e-2)


def test_a_family_and_a_small_copy_take_it(tiny: Model) -> None:
    small = made(Hashed(keep=0.3), tiny)
    copy = smaller(Model(small.gm)).materialize()
    assert bool(outputs(copy, IDS).isfinite().all())
    assert inexpressible(Model(small.gm))


def said(method: Any, model: Model) -> tuple[str, str]:
    first = method.refuses(on_meta(model), ())[0]
    return first.code, first.render()


def test_what_cannot_be_shared_is_refused(tiny: Model) -> None:
    code, words = said(Hashed(keep=0.01, scope="layer"), tiny)
    assert (code, "shorter than a row of 32" in words) == ("E340", True)
    code, words = said(Hashed(keep=0.05, mapping="roast", chunk=100000), tiny)
    assert (code, "a chunk of 100000" in words) == ("E340", True)
    assert said(Hashed(select=("head",)), tiny)[0] == "E341"
    assert said(Hashed(), made(Recursive(loops=2), tiny))[0] == "E341"
    assert said(Hashed(), made(RTN(bits=8), tiny))[0] == "E322"
    assert said(Hashed(), filled(blank(layers=2, experts=4)))[0] == "E323"
    small = made(Hashed(keep=0.3), tiny)
    assert said(RTN(), small)[0] == "E323"
    tiny.facts["learned"] = True
    assert said(Hashed(), tiny)[0] == "E327"
    assert Hashed(init="project").refuses(tiny) == []
    for wrong in ({"keep": 0.0}, {"keep": 1.5}, {"chunk": 0}, {"spread": 0.0}, {"seed": -1}):
        with pytest.raises(ValueError, match="validation error"):
            Hashed.model_validate(wrong)
