"""Optimizers and schedules: state as declared, decay as declared, rates at the ends."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from effc.compiler.method import Optimizer, Schedule
from effc.runtime.parts.train.optimizer.adamw import AdamW
from effc.runtime.parts.train.optimizer.lion import Lion
from effc.runtime.parts.train.optimizer.sgd import SGD
from effc.runtime.parts.train.schedule.constant import Constant
from effc.runtime.parts.train.schedule.cosine import Cosine
from effc.runtime.parts.train.schedule.wsd import WSD

OPTIMIZERS = [AdamW(lr=0.05), Lion(lr=0.05, wd=0), SGD(lr=0.05), SGD(lr=0.05, momentum=0.0)]


def stepped(part: Optimizer, steps: int = 1) -> tuple[nn.Parameter, nn.Parameter, torch.optim.Optimizer]:
    """A matrix and a vector after steps toward zero."""
    matrix = nn.Parameter(torch.linspace(-1, 1, 24).reshape(4, 6))
    vector = nn.Parameter(torch.ones(5))
    optimizer = part.build([("w", matrix), ("g", vector)])
    for _ in range(steps):
        optimizer.zero_grad()
        (matrix.square().sum() + vector.square().sum()).backward()
        optimizer.step()
    return matrix, vector, optimizer


@pytest.mark.parametrize("part", OPTIMIZERS)
def test_state_bytes_are_as_declared(part: Optimizer) -> None:
    matrix, _, optimizer = stepped(part)
    held = [v for v in optimizer.state[matrix].values() if isinstance(v, torch.Tensor)]
    assert sum(v.numel() * v.element_size() for v in held) == part.state_bytes(matrix.shape)


@pytest.mark.parametrize("part", OPTIMIZERS)
def test_a_bowl_goes_down(part: Optimizer) -> None:
    matrix, _, _ = stepped(part, 60)
    assert float(matrix.detach().square().sum()) < 0.2


@pytest.mark.parametrize("part", OPTIMIZERS)
def test_state_round_trips(part: Optimizer) -> None:
    matrix, vector, optimizer = stepped(part, 3)
    other = [nn.Parameter(p.detach().clone()) for p in (matrix, vector)]
    twin = part.build([("w", other[0]), ("g", other[1])])
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter in (matrix, vector, *other):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    twin.step()
    assert torch.equal(matrix, other[0])
    assert torch.equal(vector, other[1])


@pytest.mark.parametrize("part", [AdamW(lr=0.1, wd=0.5), Lion(lr=0.1, wd=0.5)])
def test_decay_shrinks_matrices_only(part: Optimizer) -> None:
    matrix, vector = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3))
    optimizer = part.build([("w", matrix), ("g", vector)])
    matrix.grad, vector.grad = torch.zeros(3, 3), torch.zeros(3)
    optimizer.step()
    assert torch.allclose(matrix, torch.full((3, 3), 1 - 0.1 * 0.5))
    assert torch.equal(vector, torch.ones(3))


def test_lion_takes_steps_of_one_size() -> None:
    w = nn.Parameter(torch.tensor([[0.5, -2.0, 3.0]]))
    optimizer = Lion(lr=0.01, wd=0.1).build([("w", w)])
    begin = w.detach().clone()
    w.grad = torch.tensor([[1e-6, -40.0, 0.0]])
    optimizer.step()
    expected = begin - 0.01 * (torch.tensor([[1.0, -1.0, 0.0]]) + 0.1 * begin)
    assert torch.allclose(w, expected, atol=1e-7)


def test_lion_keeps_its_momentum_by_the_second_beta() -> None:
    w = nn.Parameter(torch.zeros(1, 2))
    optimizer = Lion(betas=(0.5, 0.75)).build([("w", w)])
    w.grad = torch.tensor([[4.0, -8.0]])
    optimizer.step()
    assert torch.allclose(optimizer.state[w]["exp_avg"], torch.tensor([[1.0, -2.0]]))


def test_a_parameter_without_gradient_stays() -> None:
    for part in OPTIMIZERS:
        w = nn.Parameter(torch.ones(2, 2))
        part.build([("w", w)]).step()
        assert torch.equal(w, torch.ones(2, 2))


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(ValueError, match="nesterov needs momentum"):
        SGD(nesterov=True, momentum=0.0)


@pytest.mark.parametrize("part", [Constant(), Cosine(), WSD(), Cosine(warmup=0), WSD(warmup=0, decay=1)])
def test_rates_stay_between_zero_and_one(part: Schedule) -> None:
    for steps in (1, 2, 7, 100):
        rates = [part.rate(step, steps) for step in range(steps)]
        assert all(0 <= rate <= 1 for rate in rates)
        assert rates[0] > 0


def test_warmup_stable_decay_at_its_corners() -> None:
    part = WSD(warmup=0.1, decay=0.1, form="exp", final=0.1)
    rates = {step: part.rate(step, 1000) for step in (49, 899, 950)}
    assert rates[49] == pytest.approx(0.5)
    assert rates[899] == 1
    assert rates[950] == pytest.approx(0.316, abs=1e-3)
    assert WSD(warmup=0, decay=0.5).rate(75, 100) == pytest.approx(0.5)
    assert WSD(warmup=0, decay=1.0, form="sqrt").rate(25, 100) == pytest.approx(0.5)


def test_cosine_at_its_corners() -> None:
    part = Cosine(warmup=0, final=0.1)
    assert part.rate(0, 100) == 1
    assert part.rate(50, 100) == pytest.approx(0.55)
    assert part.rate(99, 100) == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize("words", [{"form": "exp"}, {"warmup": 0.6, "decay": 0.5}])
def test_schedules_that_cannot_be_are_refused(words: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"final|100%"):
        WSD(**words)


def test_no_optimizer_brings_in_the_compiler() -> None:
    """Which would cost a second and 150 MB; a fresh process, since other tests may have it already."""
    code = """
import sys, torch
from effc.runtime.parts.train.optimizer import adamw, lion, sgd
for part in (adamw.AdamW(), lion.Lion(), sgd.SGD(momentum=0.9)):
    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = part.build([("weight", weight)])
    weight.grad = torch.ones(4, 4)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
print(*(name for name in ("torch._dynamo", "torch._inductor", "triton") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_adamw_moves_as_that_of_torch_does() -> None:
    weights = [nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0))) for _ in range(2)]
    ours = AdamW(lr=1e-2, wd=0.1).build([("weight", weights[0])])
    theirs = torch.optim.AdamW([weights[1]], 1e-2, (0.9, 0.95), 1e-8, 0.1, fused=True)
    for step in range(3):
        for weight, optimizer in zip(weights, (ours, theirs), strict=True):
            weight.grad = torch.sin(weight.detach() * (step + 1))
            optimizer.step()
    assert torch.equal(*weights)
