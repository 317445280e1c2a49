"""Tuning and merging: a model that knows one language learns another, and models of two are mixed.

Rates were chosen on seed 0 of the bed; the claims run on others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from effc.compiler.method import Context
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Merge
from effc.passes.adapt.fold import Fold
from effc.passes.adapt.full import Full
from effc.passes.adapt.lora import Lora
from effc.passes.merge.linear import Linear
from effc.passes.merge.slerp import Slerp
from effc.passes.merge.task_arithmetic import TaskArithmetic
from effc.passes.merge.ties import Ties
from effc.runtime.merge import merge
from effc.runtime.parts.train.optimizer.adamw import AdamW
from effc.specs.recipe import Ref
from tests.claims import Measured

from .lab import DATA, base, data, fresh, heldout, tuned

pytestmark = pytest.mark.claim
SEEDS = (1, 2, 3)
FORMS: dict[str, Any] = {"data": DATA, "steps": 200, "batch": 32, "precision": "fp32"}
FACTORS = (0.4, 0.6, 0.8, 1.0, 1.2, 1.5, 1.8)


def full(rate: float, **more: Any) -> Full:
    return Full(train="body", optimizer=AdamW(lr=rate), **FORMS | more)


@cache
def whole(seed: int, draw: int = 0) -> Model:
    return tuned(full(3e-3), base(seed), "B", seed, draw)


@cache
def adapter(seed: int, rank: int) -> Model:
    method = Lora(rank=rank, alpha=2 * rank, optimizer=AdamW(lr=1e-2, wd=0), **FORMS)
    return tuned(method, base(seed), "B", seed)


@cache
def expert(seed: int, name: str) -> Model:
    return tuned(full(1e-3, steps=150), base(seed), name, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_training_learns_another_language(seed: int, measured: Measured) -> None:
    before, after = (heldout(model, "B", seed) for model in (base(seed), whole(seed)))
    measured("adapt.full", "200 steps take a quarter of the loss on new text", 1 - after / before, above=0.25)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_higher_rank_learns_more(seed: int, measured: Measured) -> None:
    ends = {rank: heldout(adapter(seed, rank), "B", seed) for rank in (1, 4, 16)}
    measured("adapt.lora", "rank 4 ends below rank 1", ends[4], below=ends[1])
    measured("adapt.lora", "rank 16 ends below rank 4", ends[16], below=ends[4])


@pytest.mark.xfail(reason="on this bed rank 16 stays 0.06 to 0.07 nat behind on two of three seeds")
@pytest.mark.parametrize("seed", SEEDS)
def test_rank_sixteen_learns_what_all_weights_do(seed: int, measured: Measured) -> None:
    behind = heldout(adapter(seed, 16), "B", seed) - heldout(whole(seed), "B", seed)
    measured("adapt.lora", "rank 16 ends within 0.05 nat of adapt.full", behind, below=0.05)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_folded_adapter_is_the_same_model(seed: int, measured: Measured) -> None:
    apart = adapter(seed, 16)
    rw = Rewriter(apart)
    Fold().rewrite(rw)
    ids = data("B", seed).batch("heldout", range(64)).ids
    with torch.no_grad():
        want, got = apart(ids), rw.done()(ids)
    worst = float((got - want).abs().max() / want.abs().max())
    measured(
        "adapt.fold", "logits of a trained adapter move by less than 1e-5 of the largest", worst, below=1e-5
    )


def merged(method: Merge, *models: Model, start: Model | None = None) -> Model:
    context = Context(models={} if start is None else {"base": start})
    return merge(method, models, context).model.materialize()


def both(model: Model, seed: int, split: str = "heldout") -> float:
    """Mean loss over the two languages of the experts."""
    return (heldout(model, "B", seed, split) + heldout(model, "C", seed, split)) / 2


def best(method: Callable[[float], Merge], seed: int) -> float:
    """The loss at the factor that is best on sequences of its own."""
    experts = expert(seed, "B"), expert(seed, "C")
    models = [merged(method(factor), *experts, start=base(seed)) for factor in FACTORS]
    return both(min(models, key=lambda model: both(model, seed, "valid")), seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_changes_of_experts_add_up(seed: int, measured: Measured) -> None:
    alone = min(both(expert(seed, name), seed) for name in ("B", "C"))
    added = best(lambda factor: TaskArithmetic(base=Ref("base"), lambda_=factor), seed)
    measured(
        "merge.task_arithmetic",
        "two experts added up are 0.2 nat better than either",
        alone - added,
        above=0.2,
    )
    elected = best(lambda factor: Ties(base=Ref("base"), density=0.5, lambda_=factor), seed)
    measured("merge.ties", "at density 50 % it ends below merge.task_arithmetic", elected, below=added)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_soup_is_better_than_its_members(seed: int, measured: Measured) -> None:
    members = [whole(seed, draw) for draw in range(3)]
    mean = sum(heldout(member, "B", seed) for member in members) / 3
    soup = heldout(merged(Linear(), *members), "B", seed)
    measured("merge.linear", "the mean of three runs ends below their mean loss", soup, below=mean)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_arc_keeps_lengths(seed: int, measured: Measured) -> None:
    a, b = fresh(seed), fresh(seed + 100)
    name = "layers.0.mlp.up.weight"
    length = float(a.tensors()[name].norm() + b.tensors()[name].norm()) / 2
    arc, line = (float(merged(m, a, b).tensors()[name].norm()) for m in (Slerp(), Linear()))
    measured("merge.slerp", "the midpoint keeps the length within 1 %", abs(arc / length - 1), below=0.01)
    measured("merge.slerp", "where merge.linear loses 28 %", 1 - line / length, above=0.28)
