"""What other forms of weights are for: training thin ones, sharing one array, planes of signs."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effc.compiler.blocks.hashed_linear import HashedLinear
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


SIDES = ((64, 512), (512, 512), (512, 512), (512, 10))
"""Inputs and outputs of the layers of an MLP of half a million weights."""


def task(seed: int) -> tuple[Tensor, Tensor]:
    """Points [N, 64] and the class that a random network gives them [N]; half of them are held out."""
    dice = torch.Generator().manual_seed(seed)
    x = torch.randn(4096, 64, generator=dice)
    first, second = (torch.randn(a, b, generator=dice) / a**0.5 for a, b in ((64, 96), (96, 10)))
    return x, (torch.relu(3 * x @ first) @ second).argmax(1)


def network(kind: str, keep: float, seed: int, spread: float = 1.0) -> list[nn.Module]:
    """Layers with the deviations of torch's own start: dense, or on one array of `keep` of the weights."""
    torch.manual_seed(seed)
    if kind == "dense":
        return [nn.Linear(i, o, bias=False) for i, o in SIDES]
    total = sum(i * o for i, o in SIDES)
    slots, first, made = int(keep * total), 0, []
    pool = nn.Parameter(torch.randn(slots) * spread)
    scales = torch.tensor([1 / (3 * i) ** 0.5 / spread for i, _ in SIDES])
    ends = torch.tensor([i * o for i, o in SIDES]).cumsum(0)
    for number, (i, o) in enumerate(SIDES):
        one = HashedLinear(
            in_features=i, out_features=o, slots=slots, matrices=4, number=number, fold=first // slots,
            offset=first % slots, grad_scale="none" if kind == "plain" else "v1",
        )  # fmt: skip
        one.pool, one.scales, one.ends = pool, scales, ends
        made.append(one)
        first += i * o
    return made


def run(layers: list[nn.Module], x: Tensor) -> Tensor:
    for layer in layers[:-1]:
        x = torch.relu(layer(x))
    out: Tensor = layers[-1](x)
    return out


def taught(layers: list[nn.Module], seed: int, lr: float, keep: float = 1.0) -> float:
    """Held-out loss after 300 steps of descent with momentum; with `keep`, all but the largest stay zero."""
    x, y = task(seed)
    weights = list({id(p): p.requires_grad_() for layer in layers for p in layer.parameters()}.values())
    masks = [torch.ones_like(p) for p in weights]
    if keep < 1:
        cut = torch.cat([p.detach().abs().flatten() * p.shape[1] ** 0.5 for p in weights]).quantile(1 - keep)
        masks = [(p.detach().abs() * p.shape[1] ** 0.5 > cut).float() for p in weights]
    optimizer = torch.optim.SGD(weights, lr=lr, momentum=0.9)
    for step in range(300):
        with torch.no_grad():
            for weight, mask in zip(weights, masks, strict=True):
                weight *= mask
        rows = torch.randint(0, 2048, (128,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.cross_entropy(run(layers, x[rows]), y[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        for weight, mask in zip(weights, masks, strict=True):
            weight *= mask
        return float(F.cross_entropy(run(layers, x[2048:]), y[2048:]))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_shared_array_trains_like_dense_and_beats_pruning_at_the_start(
    seed: int, measured: Measured
) -> None:
    about = "reparam.hashed"
    dense = taught(network("dense", 1.0, seed), seed, 0.05)
    whole = taught(network("v1", 1.0, seed), seed, 0.05)
    measured(about, "keep = 100 % trains like dense: held-out loss over dense's", whole / dense, below=1.1)
    small = taught(network("v1", 0.05, seed), seed, 0.05)
    pruned = taught(network("dense", 1.0, seed), seed, 0.05, keep=0.05)
    measured(about, "keep = 5 % ends below 5 % of the weights kept by size at the start (nats)",
             small - pruned, below=0.0)  # fmt: skip
    loud = taught(network("v1", 0.05, seed, spread=10.0), seed, 0.05)
    measured(about, "an array of ten times the deviation trains alike: loss over that of one",
             loud / small, below=1.05)  # fmt: skip


@pytest.mark.parametrize("seed", SEEDS)
def test_scaled_gradients_do_not_see_the_array_s_deviation(seed: int, measured: Measured) -> None:
    """Of a tenth of the deviation: without scaling, steps of weights are a hundred times as long."""
    about = "reparam.hashed"
    words = "keep = 5 %, an array of deviation 0.01: loss over that of one of 0.1,"
    for kind, name in (("v1", "scaled"), ("plain", "not scaled")):
        ends = [taught(network(kind, 0.05, seed, spread=spread), seed, 0.05) for spread in (0.1, 0.01)]
        ratio = ends[1] / ends[0] if math.isfinite(ends[1]) else math.inf
        limit = {"below": 1.05} if kind == "v1" else {"above": 2.0}
        measured(about, f"{words} {name}", ratio, **limit)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_shared_array_beats_pruning_at_every_ratio(seed: int, measured: Measured) -> None:
    for keep in (1.0, 0.1, 0.01):
        mine = taught(network("v1", keep, seed), seed, 0.05)
        pruned = taught(network("dense", 1.0, seed), seed, 0.05, keep=keep)
        claim = f"keep = {keep:.0%}: loss over that of as many weights kept by size at the start"
        measured("reparam.hashed", claim, mine / pruned, below=1.0 if keep < 1 else 1.1)
