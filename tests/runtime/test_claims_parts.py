"""What optimizers and schedules are for: a small decoder learns a language whose entropy is known."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
import torch
from torch import Tensor

from effc.compiler.method import Batch, Context, Optimizer, Schedule
from effc.compiler.step import Step
from effc.passes.adapt.full import Full
from effc.runtime.evaluate import loss
from effc.runtime.fit import fit
from effc.runtime.parts.train.optimizer.adamw import AdamW
from effc.runtime.parts.train.optimizer.lion import Lion
from effc.runtime.parts.train.optimizer.sgd import SGD
from effc.runtime.parts.train.schedule.constant import Constant
from effc.runtime.parts.train.schedule.cosine import Cosine
from effc.runtime.parts.train.schedule.wsd import WSD
from effc.specs.recipe import Ref
from tests.claims import Measured

from .doubles import VOCABULARY, tiny

pytestmark = pytest.mark.claim
SEEDS = (0, 1, 2)
LENGTH, FOLLOWERS = 64, 8
PLAIN = AdamW(lr=3e-3, wd=0.1)


class Pairs:
    """A Markov chain of order one: eight tokens may follow each, with probabilities of their own."""

    vocabulary = "pairs"
    bytes_per_token = 1.0

    def __init__(self, seed: int) -> None:
        self.fingerprint = f"pairs {seed}"
        dice = torch.Generator().manual_seed(seed)
        self.next = torch.randint(0, VOCABULARY, (VOCABULARY, FOLLOWERS), generator=dice)
        self.chance = (1.5 * torch.randn(VOCABULARY, FOLLOWERS, generator=dice)).softmax(-1)
        self.ids = {"train": self.draw(4000, dice), "heldout": self.draw(200, dice)}

    def draw(self, rows: int, dice: torch.Generator) -> Tensor:
        """Ids [N, T]"""
        ids = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=dice)
        for t in range(1, LENGTH):
            last = ids[:, t - 1 : t]
            pick = torch.multinomial(self.chance[last[:, 0]], 1, generator=dice)
            ids[:, t] = self.next[last[:, 0]].gather(1, pick)[:, 0]
        return ids

    def entropy(self) -> float:
        """Mean surprise of the held-out tokens under the chain itself, in nats."""
        table = torch.zeros(VOCABULARY, VOCABULARY).scatter_add(1, self.next, self.chance)
        ids = self.ids["heldout"]
        return float(-table[ids[:, :-1], ids[:, 1:]].log().mean())

    def size(self, split: str) -> int:
        return len(self.ids[split])

    def tokens(self, split: str) -> int:
        return self.size(split) * (LENGTH - 1)

    def batch(self, split: str, indices: Sequence[int]) -> Batch:
        ids = self.ids[split][[i % self.size(split) for i in indices]]
        labels = torch.cat([ids[:, 1:], torch.full((len(ids), 1), -100)], 1)
        return Batch(ids, labels, Step(torch.arange(LENGTH).expand_as(ids)))


@cache
def pairs(seed: int) -> Pairs:
    return Pairs(seed)


@cache
def ends(seed: int, steps: int, optimizer: Optimizer, schedule: Schedule | None = None) -> float:
    """Held-out loss of a model 64 wide after a training."""
    method = Full(
        data=Ref("pairs"), steps=steps, batch=16, optimizer=optimizer, schedule=schedule, precision="fp32"
    )
    model = fit(method, tiny(width=64, seed=seed), Context(seed, {"data": pairs(seed)})).model
    return loss(model, pairs(seed))


@pytest.mark.parametrize("seed", SEEDS)
def test_adamw_nears_the_entropy(seed: int, measured: Measured) -> None:
    above = ends(seed, 600, PLAIN) - pairs(seed).entropy()
    measured("train.optimizer.adamw", "600 steps at 3e-3 end within 0.3 nat of the entropy", above, below=0.3)


@pytest.mark.xfail(reason="3e-4 suits models larger than this one: 2 nats are left")
@pytest.mark.parametrize("seed", SEEDS)
def test_so_does_adamw_at_its_own_rate(seed: int, measured: Measured) -> None:
    above = ends(seed, 400, AdamW()) - pairs(seed).entropy()
    claim = "400 steps at its own rate end within 0.3 nat of the entropy"
    measured("train.optimizer.adamw", claim, above, below=0.3)


@pytest.mark.parametrize("seed", SEEDS)
def test_sgd_nears_the_entropy(seed: int, measured: Measured) -> None:
    above = ends(seed, 400, SGD()) - pairs(seed).entropy()
    measured(
        "train.optimizer.sgd", "400 steps at its own rate end within 0.3 nat of the entropy", above, below=0.3
    )


@pytest.mark.xfail(reason="9 % above on each seed: batches of 16 are small for Lion")
@pytest.mark.parametrize("seed", SEEDS)
def test_lion_is_as_good_as_adamw_at_its_rate(seed: int, measured: Measured) -> None:
    ratio = ends(seed, 600, Lion(lr=PLAIN.lr / 5, wd=5 * PLAIN.wd)) / ends(seed, 600, PLAIN)
    measured(
        "train.optimizer.lion",
        "a fifth of the rate, five times the decay: within 5 % of adamw",
        ratio,
        below=1.05,
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_rates_that_fall_end_lower(seed: int, measured: Measured) -> None:
    level, round_, late = (ends(seed, 600, PLAIN, s) for s in (Constant(), Cosine(), WSD()))
    above = level - pairs(seed).entropy()
    measured("train.schedule.constant", "600 steps end within 0.3 nat of the entropy", above, below=0.3)
    measured("train.schedule.cosine", "it ends below the constant rate", round_, below=level)
    measured(
        "train.schedule.wsd", "its decay ends below the constant rate it branched from", late, below=level
    )
    measured("train.schedule.wsd", "it ends within 0.02 nat of cosine", abs(late - round_), below=0.02)
