"""Mixtures of experts earn their weights: a model that goes on as a mixture learns what the dense one cannot.

The bed is a decoder of four layers, 128 wide, on Markov chains; rates were chosen on seed 0, and the claims
run on others.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from effc.compiler.auxiliary import usage
from effc.compiler.method import Context
from effc.compiler.model import Model
from effc.passes.adapt.full import Full
from effc.passes.moe.upcycle import Upcycle
from effc.runtime.fit import fit
from effc.runtime.parts.train.optimizer.adamw import AdamW
from effc.runtime.rewriting import rewrite
from tests.claims import Measured

from .lab import DATA, data, fresh, heldout

pytestmark = pytest.mark.claim
SEEDS = (1, 2, 3)
ROWS = 8000
RATE = 2e-3


def trained(model: Model, seed: int, steps: int, draw: int) -> Model:
    method = Full(data=DATA, steps=steps, batch=16, precision="fp32", optimizer=AdamW(lr=RATE))
    return fit(method, model, Context(seed + 100 * draw, {"data": data("A", seed, ROWS)})).model


@cache
def dense(seed: int) -> Model:
    """Stopped early, so that there is more to learn than it can hold."""
    return trained(fresh(seed, layers=4, width=128), seed, 300, draw=0)


def mixture(seed: int) -> Model:
    method = Upcycle(experts=4, top_k=2, every=2)
    return rewrite(method, dense(seed), Context(seed)).model


@pytest.mark.parametrize("seed", SEEDS)
def test_a_mixture_starts_as_the_model_it_was_made_from(seed: int, measured: Measured) -> None:
    ids = data("A", seed, ROWS).batch("heldout", range(64)).ids
    before, after = dense(seed), mixture(seed)
    with torch.no_grad():
        want, got = before(ids), after(ids)
    worst = float((got - want).abs().max() / want.abs().max())
    measured("moe.upcycle", "logits at the start within 1e-5 of the largest", worst, below=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_mixture_learns_no_less_than_the_dense_model(seed: int, measured: Measured) -> None:
    wide = trained(mixture(seed), seed, 500, draw=1)
    same = trained(dense(seed), seed, 500, draw=1)
    losses = [heldout(model, "A", seed, train=ROWS) for model in (wide, same)]
    claim = "after 500 more steps the loss is at most that of the dense model after as many"
    measured("moe.upcycle", claim, losses[0], below=losses[1])
    batch = data("A", seed, ROWS).batch("heldout", range(300))
    least = min(float(share.min()) for share in usage(wide, batch).values())
    measured("moe.upcycle", "every expert gets at least 5 % of the choices", least, above=0.05)
