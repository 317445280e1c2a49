"""What the methods are for, shown on a small decoder that has learnt something, with three seeds.

The text has structure a model can learn in seconds: short words in a fixed order with noise.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from effc.compiler.method import Context
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Calibrate, Rewrite
from effc.passes.grow.stack import Stack
from effc.passes.prune.depth import Depth
from effc.passes.prune.magnitude import Magnitude
from effc.passes.prune.wanda import Wanda
from effc.passes.quantize.gptq import GPTQ
from effc.passes.quantize.rtn import RTN
from effc.passes.reparam.low_rank import LowRank
from effc.passes.tie.recursive import Recursive
from effc.runtime.calibrate import calibrate
from effc.specs.recipe import Ref
from tests.claims import Measured

from .tiny_models import VOCAB, Sequences, blank, filled

pytestmark = pytest.mark.claim
CODE = Ref("code")
SEEDS = (0, 1, 2)
LENGTH = 24


def text(rows: int, seed: int) -> Tensor:
    """Ids [N, T]: each row walks a permutation by one of two strides, one token in ten replaced."""
    dice = torch.Generator().manual_seed(seed)
    order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(99))
    start = torch.randint(0, VOCAB, (rows, 1), generator=dice)
    stride = torch.randint(1, 3, (rows, 1), generator=dice) * 5
    ids = order[(start + stride * torch.arange(LENGTH)) % VOCAB]
    noise = torch.randint(0, VOCAB, ids.shape, generator=dice)
    return torch.where(torch.rand(ids.shape, generator=dice) < 0.1, noise, ids)


def loss(model: Model, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def heldout(model: Model) -> float:
    with torch.no_grad():
        return float(loss(model, text(256, seed=12345)))


def train(model: Model, steps: int, seed: int, rate: float = 3e-3) -> Model:
    """A copy, trained for some steps of 16 rows."""
    trained = model.clone()
    for name, tensor in model.tensors().items():
        trained.place(name, tensor.detach().clone())
    parameters = list(trained.parameters())
    for parameter in parameters:
        parameter.requires_grad_(parameter.is_floating_point())
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    for step in range(steps):
        optimizer.zero_grad()
        loss(trained, text(16, seed=1000 * seed + step)).backward()
        optimizer.step()
    for parameter in parameters:
        parameter.requires_grad_(False)
    return trained


@cache
def learnt(seed: int, layers: int = 4, steps: int = 300) -> Model:
    return train(filled(blank(layers=layers, tied=False), seed), steps, seed)


def stage(method: Rewrite | Calibrate, model: Model) -> Model:
    if isinstance(method, Rewrite):
        rw = Rewriter(model, method.kind)
        method.rewrite(rw)
        return rw.done()
    data = Sequences(model)
    data.ids = text(64, seed=777)
    return calibrate(method, model, Context(data={"data": data})).model


def known(seed: int) -> float:
    return heldout(learnt(seed))


def rise(method: Rewrite | Calibrate, seed: int) -> float:
    """How far the held-out loss rises above that of the model the stage was given."""
    model = learnt(seed)
    return heldout(stage(method, model)) - heldout(model)


@pytest.mark.parametrize("seed", SEEDS)
def test_rtn_more_bits_lose_less(seed: int, measured: Measured) -> None:
    rises = {bits: rise(RTN(bits=bits, group=16), seed) for bits in (8, 4, 3, 2)}
    measured(
        "quantize.rtn", "8 bits change the loss by less than 0.5 %", abs(rises[8]) / known(seed), below=0.005
    )
    for more, less in ((8, 4), (4, 3), (3, 2)):
        measured("quantize.rtn", f"{more} bits lose less than {less}", rises[more], below=rises[less])
    free = rise(RTN(bits=2, group=16, scheme="asymmetric"), seed)
    measured("quantize.rtn", "asymmetric loses less than symmetric at 2 bits", free, below=rises[2])


@pytest.mark.parametrize("seed", SEEDS)
def test_gptq_loses_less_than_rounding_at_three_bits(seed: int, measured: Measured) -> None:
    rounded = rise(RTN(bits=3), seed)
    measured(
        "quantize.gptq",
        "loses less than quantize.rtn at 3 bits",
        rise(GPTQ(data=CODE, bits=3), seed),
        below=rounded,
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_wanda_loses_less_than_magnitude_in_the_same_pattern(seed: int, measured: Measured) -> None:
    patterns = ("2:4", "4:8")
    wanda = sum(rise(Wanda(data=CODE, pattern=p), seed) for p in patterns)  # type: ignore[arg-type]
    plain = sum(rise(Magnitude(pattern=p), seed) for p in patterns)  # type: ignore[arg-type]
    measured("prune.wanda", "loses less than prune.magnitude, 2:4 and 4:8 added up", wanda, below=plain)


@pytest.mark.parametrize("seed", SEEDS)
def test_magnitude_holds_at_little_sparsity(seed: int, measured: Measured) -> None:
    few, half, most = (rise(Magnitude(sparsity=s), seed) for s in (0.1, 0.5, 0.9))
    measured("prune.magnitude", "10 % cost less than 5 % of the loss", few / known(seed), below=0.05)
    measured("prune.magnitude", "10 % cost less than 50 %", few, below=half)
    measured("prune.magnitude", "50 % cost less than 90 %", half, below=most)


@pytest.mark.parametrize("seed", SEEDS)
def test_depth_removes_the_layer_that_costs_least(seed: int, measured: Measured) -> None:
    model = learnt(seed)
    chosen = rise(Depth(data=CODE, keep=3), seed)
    others = []
    for layer in range(4):
        rw = Rewriter(model)
        rw.remove_layers([layer])
        others.append(heldout(rw.done()) - heldout(model))
    third = sorted(others)[2]
    measured(
        "prune.depth", "the layer it takes is one of the two of four that cost least", chosen, below=third
    )
    healed = train(stage(Depth(data=CODE, keep=3), model), 100, seed + 50, 1e-3)
    left = (heldout(healed) - heldout(model)) / chosen
    measured("prune.depth", "100 steps bring back 70 % of what it cost", 1 - left, above=0.7)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_activation_metric_beats_the_weight_metric(seed: int, measured: Measured) -> None:
    by_input = rise(LowRank(rank=10, select=("mlp",), metric="activation", data=CODE), seed)
    by_weight = rise(LowRank(rank=10, select=("mlp",)), seed)
    measured("reparam.low_rank", "metric = activation loses less than weight", by_input, below=by_weight)


@pytest.mark.parametrize("seed", SEEDS)
def test_own_differences_help_shared_layers_and_healing_closes_the_gap(seed: int, measured: Measured) -> None:
    model = learnt(seed)
    strict, relaxed = (stage(Recursive(loops=2, lora_rank=r), model) for r in (0, 12))
    gap = heldout(relaxed) - heldout(model)
    alike = heldout(strict) - heldout(model)
    measured("tie.recursive", "differences of rank 12 lose less than none", gap, below=alike)
    healed = train(relaxed, 300, seed + 70, 1e-3)
    closed = 1 - (heldout(healed) - heldout(model)) / gap
    measured("tie.recursive", "300 steps close 80 % of the gap", closed, above=0.8)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_stacked_model_learns_faster_than_a_fresh_one(seed: int, measured: Measured) -> None:
    base = learnt(seed, layers=2, steps=150)
    stacked = stage(Stack(factor=4), base)
    fresh = filled(blank(layers=8, tied=False), seed + 10)
    random = heldout(fresh)
    measured(
        "grow.stack", "right after growth it is nearer than random weights", heldout(stacked), below=random
    )
    spent = 150 * 2 // 8  # the base's training, in steps of the deep model
    ended = heldout(train(stacked, 150, seed + 90, 1e-3))
    alone = heldout(train(fresh, 150 + spent, seed + 90, 1e-3))
    measured("grow.stack", "a stacked model ends below a fresh one at equal work", ended, below=alone)
