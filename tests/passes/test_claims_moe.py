"""Mixtures of experts earn their weights: a model that goes on as a mixture learns what the dense one cannot.

The bed is a decoder of four layers, 128 wide, on Markov chains; rates were chosen on seed 0, and the claims
run on others.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from effc.compiler.auxiliary import usage
from effc.compiler.blocks.tempered import Gate, gated
from effc.compiler.method import Context, Schedule
from effc.compiler.model import Model
from effc.passes.adapt.full import Full
from effc.passes.moe.upcycle import Upcycle
from effc.runtime.evaluate import loss
from effc.runtime.fit import fit
from effc.runtime.parts.train.optimizer.adamw import AdamW
from effc.runtime.parts.train.schedule.constant import Constant
from effc.runtime.parts.train.schedule.cosine import Cosine
from effc.runtime.parts.train.schedule.wsd import WSD
from effc.runtime.rewriting import rewrite
from tests.claims import Measured

from .lab import DATA, data, fresh, heldout
from .test_claims_experts import domains

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


@cache
def copied(seed: int) -> Model:
    """Eight copies of both blocks of a model at its full rate, of which a token takes two."""
    method = Full(
        data=DATA, steps=200, batch=16, precision="fp32", optimizer=AdamW(lr=5e-3), schedule=Constant()
    )
    base = fit(method, fresh(seed), Context(seed, {"data": domains(seed)})).model
    return rewrite(Upcycle(experts=8, top_k=2, router_std=0.01), base, Context(seed)).model


@cache
def ended(seed: int, schedule: Schedule, steps: int) -> float:
    method = Full(
        data=DATA, steps=steps, batch=16, precision="fp32", optimizer=AdamW(lr=5e-3), schedule=schedule
    )
    return loss(fit(method, copied(seed), Context(seed + 100, {"data": domains(seed)})).model, domains(seed))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_decay_of_a_stable_training_gives_the_drop(seed: int, measured: Measured) -> None:
    stable, on = (ended(seed, Constant(), steps) for steps in (320, 400))
    decayed, cosine = (ended(seed, schedule, 400) for schedule in (WSD(decay=0.2), Cosine()))
    claim = "8 experts: nats that the last 80 of 400 steps take at a falling rate, over at the full one"
    measured("moe.upcycle", claim, (stable - decayed) / max(stable - on, 1e-3), above=2.0)
    claim = "8 experts, wsd: nats above cosine after as many steps"
    measured("moe.upcycle", claim, decayed - cosine, below=0.02)


def found(act: Gate, seed: int) -> float:
    """log tau as descent finds it, with the gate and two linear experts, from their mixture's own numbers.

    x [N, 2] -> y is a_1 x or a_2 x and noise, the expert drawn by softmax(act(W x + b) / tau), tau = 0.3.
    """
    dice = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(4000, 2, generator=dice)
    w, b = torch.tensor([[1.0, 0.5], [-0.5, 1.0]]), torch.tensor([0.2, -0.2])
    slopes = torch.tensor([[2.0, -1.0], [-1.0, 2.0]])
    p = (gated(x @ w.T + b, act) / 0.3).softmax(-1)
    chosen = torch.multinomial(p, 1, generator=dice)[:, 0]
    y = (slopes[chosen] * x).sum(-1) + 0.3 * torch.randn(len(x), generator=dice)
    drawn = torch.randn(2, 2, generator=dice), torch.zeros(2), torch.randn((), generator=dice)
    given = [t.requires_grad_() for t in (*drawn, slopes.clone())]
    optimizer = torch.optim.Adam(given, lr=0.02)
    for _ in range(1500):
        scores = gated(x @ given[0].T + given[1], act) / given[2].exp()
        near = -((y[:, None] - x @ given[3].T) ** 2) / (2 * 0.3**2)
        optimizer.zero_grad()
        (-(scores.log_softmax(-1) + near).logsumexp(-1).mean()).backward()
        optimizer.step()
    return float(given[2].detach())


def test_a_bent_gate_finds_its_temperature_and_a_straight_one_does_not(measured: Measured) -> None:
    acts: tuple[Gate, Gate] = ("none", "sigmoid")
    spread = {act: torch.tensor([found(act, seed) for seed in range(8)]).std() for act in acts}
    claim = "two experts, a learned tau: its deviation over 8 seeds under act = sigmoid, over that under none"
    measured("moe.temperature_gate", claim, float(spread["sigmoid"] / spread["none"]), below=0.5)
