"""What other forms of weights are for: training thin ones, sharing one array, planes of signs."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from effc.compiler.cost import count
from effc.compiler.method import Context
from effc.compiler.model import Model
from effc.passes.adapt.full import Full
from effc.passes.quantize.rtn import RTN
from effc.passes.reparam.shift_add import ShiftAdd
from effc.passes.reparam.sparse_low_rank import SparseLowRank
from effc.runtime.data.corpus import Corpus
from effc.runtime.evaluate import loss
from effc.runtime.models.load import Load
from effc.runtime.parts.train.optimizer.adamw import AdamW
from effc.runtime.stage import run_stage
from effc.specs.recipe import Ref
from tests.claims import Measured

from .edited import edited
from .lab import DATA, fresh, heldout, tuned

pytestmark = pytest.mark.claim
SEEDS = (0, 1, 2)


def trained(model: Model, seed: int, steps: int, lr: float = 3e-3) -> float:
    """The held-out loss after a training from what the model is."""
    method = Full(data=DATA, steps=steps, batch=32, precision="fp32", optimizer=AdamW(lr=lr))
    return heldout(tuned(method, model, "A", seed), "A", seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_scattered_numbers_beat_a_thin_product_alone(seed: int, measured: Measured) -> None:
    model, losses = fresh(seed, layers=4), []
    for density in (0.03, 1 / 64**2):
        thin = edited(SparseLowRank(rank=16, alpha=16.0, density=density, seed=seed), model)
        losses.append(trained(thin, seed, 300))
    measured(
        "reparam.sparse_low_rank",
        "rank 16 and 3 % of places end below rank 16 alone, 4 layers, 300 steps (nats)",
        losses[0] - losses[1],
        below=0.0,
    )


CODE = Ref("code")


@cache
def zoo() -> Model:
    return Load(path="zoo:pylm").open({}).materialize()


@cache
def code() -> Any:
    files = zoo().tokenizer
    assert files is not None
    return Corpus(name="python-stdlib", seq=128).open(files.files)


class Few:
    """The first held-out sequences."""

    def __init__(self) -> None:
        self.whole = code()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)

    def size(self, split: str) -> int:
        return min(32, int(self.whole.size(split)))


def test_two_planes_lose_less_than_two_bits_rounded(measured: Measured) -> None:
    made = {
        "planes": ShiftAdd(data=CODE, bits=2, samples=32, rounds=8),
        "weights": ShiftAdd(bits=2, metric="weight", rounds=8),
        "rtn": RTN(bits=2, group=64),
    }
    models = {
        name: run_stage(method, [zoo()], Context(data={"data": code()})).model
        for name, method in made.items()
    }
    before = loss(zoo(), Few())  # type: ignore[arg-type]
    rises = {name: loss(model, Few()) - before for name, model in models.items()}  # type: ignore[arg-type]
    about = "reparam.shift_add"
    measured(about, "2 bits lose a share of what rtn at 2 bits in groups of 64 loses",
             rises["planes"] / rises["rtn"], below=0.5)  # fmt: skip
    measured(about, "in bytes, as a share of its", count(models["planes"]).bytes / count(models["rtn"]).bytes,
             below=1.0)  # fmt: skip
    measured(about, "looking at outputs loses a share of what looking at weights loses",
             rises["planes"] / rises["weights"], below=0.8)  # fmt: skip
