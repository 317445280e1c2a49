"""Claims of methods that spend less on some tokens, on small models of languages that are easy and hard."""

from __future__ import annotations

import time
from functools import cache
from itertools import pairwise

import pytest
import torch

import effc.runtime.generate  # noqa: F401  models learn to generate by it
from effc.compiler.cost import count
from effc.compiler.losses import IGNORED
from effc.compiler.method import Batch, Context
from effc.compiler.model import Model
from effc.compiler.ops_adaptive import LEFT, depths
from effc.compiler.plan import ATTENDED
from effc.compiler.spent import counting
from effc.compiler.step import Cache
from effc.passes.adapt.full import Full
from effc.passes.adaptive.acm import Adaptive, _modules, _seen
from effc.passes.adaptive.early_exit import EarlyExit
from effc.passes.adaptive.skipdecode import SkipDecode
from effc.passes.adaptive.slimmable import Slimmable
from effc.passes.grow.parscale import ParScale
from effc.runtime.evaluate import loss
from effc.runtime.fit import fit
from effc.runtime.parts.train.optimizer.adamw import AdamW
from effc.runtime.stage import run_stage
from tests.claims import Measured

from .lab import DATA, LENGTH, VOCAB, Chains, chains, data, fresh

pytestmark = pytest.mark.claim
SEEDS = (0, 1, 2)


class Mixed(Chains):
    """Every other sequence counts upwards, which is easy; the others are chains of order two, and hard."""

    def __init__(self, seed: int) -> None:
        self.ids = {}
        for split, rows, draw in (("train", 4000, 0), ("valid", 100, 1), ("heldout", 300, 2)):
            hard = chains("A", rows, seed, draw=seed + 10_000 * draw)
            start = torch.arange(rows)[:, None] % VOCAB
            easy = (start + torch.arange(LENGTH)) % VOCAB
            self.ids[split] = torch.where(torch.arange(rows)[:, None] % 2 == 0, easy, hard)


@cache
def mixed(seed: int) -> Mixed:
    return Mixed(seed)


@cache
def trained(seed: int, layers: int = 6) -> Model:
    method = Full(data=DATA, steps=250, batch=32, precision="fp32", optimizer=AdamW(lr=3e-3))
    return fit(method, fresh(seed, layers=layers), Context(seed, {"data": mixed(seed)})).model


@pytest.mark.parametrize("seed", SEEDS)
def test_easy_tokens_leave_earlier(seed: int, measured: Measured) -> None:
    base, text = trained(seed), mixed(seed)
    method = EarlyExit(
        data=DATA, steps=400, batch=16, every=2, warmup=100, switch_every=50, lambda_cost=0.3,
        precision="fp32", optimizer=AdamW(lr=1e-2),
    )  # fmt: skip
    outcome = fit(method, base, Context(seed, {"data": text}))
    model, found = outcome.model, outcome.measures
    batch = text.batch("heldout", range(100))
    with torch.no_grad():
        model(batch.ids, step=batch.step)
    left = batch.step.sides[LEFT]
    depth = torch.where(left < 0, 6, 2 * (left + 1)).double()[:, 2:]
    easy, hard = float(depth[0::2].mean()), float(depth[1::2].mean())
    name = "adaptive.early_exit"
    measured(name, "layers that an easy token runs, in parts of those of a hard one", easy / hard, below=0.8)
    share = found["flops_spent"] / count(base, ATTENDED).flops_per_token
    measured(name, "operations a token, in parts of the model's", share, below=0.95)
    gap = loss(model, text) - loss(base, text)
    measured(name, "nats a token lost by leaving", gap, below=0.3)
    ratio = found["flops_expected"] / found["flops_spent"]
    measured(name, "cost by P over cost counted, distance from 1", abs(ratio - 1), below=0.15)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_schedule_spends_what_its_formula_says_and_heals(seed: int, measured: Measured) -> None:
    base, text = trained(seed), mixed(seed)
    chosen = SkipDecode(max_layers=6, min_layers=3, horizon=LENGTH, prompt="scheduled")
    later = run_stage(chosen, [base], Context(seed)).model
    ids = text.batch("heldout", range(4)).ids
    cache = Cache(LENGTH)
    with counting(later, ATTENDED) as found, torch.no_grad():
        for t in range(LENGTH):
            later(ids[:, t : t + 1], step=later.step(ids[:, t : t + 1], None, cache))
    want = float(depths(torch.arange(LENGTH), 6, 3, LENGTH).double().mean())
    name = "adaptive.skipdecode"
    measured(name, "layers a token, counted less formula", abs(found.depth - want), below=1e-9)
    planned = count(later, ATTENDED).flops_per_token
    measured(
        name, "operations counted over planned, less 1", abs(found.flops_per_token / planned - 1), below=1e-3
    )
    method = Full(data=DATA, steps=150, batch=16, precision="fp32", optimizer=AdamW(lr=1e-3))
    healed = fit(method, later, Context(seed, {"data": text})).model
    before, right, after = (loss(m, text) for m in (base, later, healed))
    measured(
        name,
        "share of the lost nats that fine-tuning brings back",
        (right - after) / (right - before),
        above=0.7,
    )


@pytest.mark.xfail(
    raises=AssertionError,
    strict=False,
    reason="on seed 0 two streams lose 0.0008 nat here, and 0.0014 and 0.0012 at rates of 1e-2 and 3e-2",
)
@pytest.mark.parametrize("seed", SEEDS)
def test_more_streams_say_more(seed: int, measured: Measured) -> None:
    """Frozen weights, trained prefixes: the card asks for a gain that grows slower than the streams."""
    text = data("A", seed, 8000)
    base = fit(
        Full(data=DATA, steps=200, batch=32, precision="fp32", optimizer=AdamW(lr=3e-3)),
        fresh(seed),
        Context(seed, {"data": text}),
    ).model
    losses = {1: loss(base, text)}
    for streams in (2, 4):
        big = run_stage(ParScale(streams=streams, prefix=8), [base], Context(seed)).model
        method = Full(
            data=DATA, steps=300, batch=16, precision="fp32", optimizer=AdamW(lr=3e-3),
            train=("prefix", "aggregate"),
        )  # fmt: skip
        losses[streams] = loss(fit(method, big, Context(seed, {"data": text})).model, text)
    two, four = losses[1] - losses[2], losses[1] - losses[4]
    name = "grow.parscale"
    measured(name, "nats a token gained by 2 streams of a frozen model", two, above=0.0)
    measured(name, "nats a token gained by 4 streams over those by 2", four / two, above=1.0)
    measured(name, "nats a token gained by 4 streams over twice those by 2", four / (2 * two), below=1.0)


def test_streams_cost_less_time_than_work(measured: Measured) -> None:
    base = fresh(0, layers=4, width=256)
    big = run_stage(ParScale(streams=4, prefix=8), [base], Context(0)).model
    times = {}
    for name, model in (("base", base), ("big", big)):
        runs = []
        for _ in range(5):
            start = time.perf_counter()
            model.generate(torch.ones(1, 4, dtype=torch.int64), max_new_tokens=12)
            runs.append(time.perf_counter() - start)
        times[name] = min(runs)
    ratio = times["big"] / times["base"]
    measured("grow.parscale", "time of a token at batch 1 in 4 streams over 1", ratio, below=4.0)


@pytest.mark.parametrize("seed", SEEDS)
def test_learners_keep_to_the_budget(seed: int, measured: Measured) -> None:
    base, text = trained(seed), mixed(seed)
    method = Adaptive(
        data=DATA, steps=500, batch=16, targets=("ffn",), budget=0.5, lambda_budget=10.0, precision="fp32",
        optimizer=AdamW(lr=3e-3),
    )  # fmt: skip
    outcome = fit(method, base, Context(seed, {"data": text}))
    name = "adaptive.acm"
    cost = outcome.measures["cost"]
    measured(
        name, "share of the learners' work done, distance from a budget of 50%", abs(cost - 0.5), below=0.05
    )
    measured(name, "nats a token lost at that", loss(outcome.model, text) - loss(base, text), below=0.1)
    lost = told_right(base, text) - told_right(outcome.model, text)
    measured(name, "share of tokens told right, lost at that", lost, below=0.01)
    first = fit(
        method.model_copy(update={"distil": 1.0, "gating": 0.0, "steps": 250}),
        base,
        Context(seed, {"data": text}),
    ).model
    rises = _rises(base, first, text.batch("heldout", range(50)))
    measured(name, "modules and k at which one more learner does not lower the error", rises, below=0.5)


@torch.no_grad()
def told_right(model: Model, text: Mixed) -> float:
    """The share of held-out tokens that the largest logit names."""
    batch = text.batch("heldout", range(text.size("heldout")))
    z = model(batch.ids, step=batch.step)
    counted = batch.labels != IGNORED
    return float((z.argmax(-1) == batch.labels)[counted].double().mean())


def _rises(base: Model, model: Model, batch: Batch) -> int:
    units = _modules(model)
    seen = _seen(base, list(units), batch)
    with torch.no_grad():
        errors = [
            (u.sums(x) - y.unsqueeze(1)).square().mean((0, 2))
            for u, (x, y) in ((units[p], seen[p]) for p in units)
        ]
    return sum(int((e[1:] >= e[:-1]).sum()) for e in errors)


@cache
def widths(seed: int, ci_kd: float) -> dict[str, float]:
    """Surprise of every configuration after a training at three widths."""
    method = Slimmable(
        data=DATA, widths=(0.25, 0.5, 1.0), steps=200, batch=16, random=1, ci_kd=ci_kd, precision="fp32",
        optimizer=AdamW(lr=2e-3),
    )  # fmt: skip
    found = fit(method, trained(seed, layers=4), Context(seed, {"data": mixed(seed)})).measures
    return dict(found["widths"])


@pytest.mark.parametrize("seed", SEEDS)
def test_wider_is_better_and_the_whole_loses_little(seed: int, measured: Measured) -> None:
    told = widths(seed, 1.0)
    names = [f"{w}% {w}%" for w in ("25", "50", "100")]
    name = "adaptive.slimmable"
    falls = sum(told[a] <= told[b] for a, b in pairwise(names))
    measured(name, "steps in width at which a wider model is no better", falls, below=0.5)
    before = loss(trained(seed, layers=4), mixed(seed))
    measured(name, "nats that the whole model lost by it", told[names[2]] - before, below=0.1)


@pytest.mark.xfail(
    raises=AssertionError,
    strict=False,
    reason="a quarter of this decoder is 0.0034 and 0.0069 nat worse for it on seeds 0 and 1",
)
@pytest.mark.parametrize("seed", SEEDS)
def test_widths_that_hear_from_the_whole_do_better(seed: int, measured: Measured) -> None:
    gap = widths(seed, 1.0)["25% 25%"] - widths(seed, 0.0)["25% 25%"]
    measured("adaptive.slimmable", "nats of 25% with features compared, less without", gap, below=0.0)
