"""What one narrow transformer layer reaches on this machine, forward and in training: the planner's rates.

Small models spend much of their time outside matrix products, so the rate of large products alone would
promise far too much. A layer of width 256 gives the low end; the planner goes from there to the rate of large
products as models get wider.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from effc.compiler.blocks import MLP, Attention, Norm
from effc.compiler.step import Step
from effc.specs.target import NARROW

WIDTH, HIDDEN, HEADS = NARROW, 704, 4
BATCH, LENGTH = 4, 256
FORWARD = 16
"""Sequences of a forward pass: calibrations and losses run 4096 tokens at once, which caches hold worse."""
_RUNS = 5


def forward_rate(dtype: torch.dtype, place: torch.device) -> float:
    """Floating-point operations a second of a layer's forward pass."""
    layer, x, step = _layer(dtype, place, FORWARD)
    with torch.inference_mode():
        return _flops(layer, FORWARD) / _quick(lambda: _through(layer, x, step), place)


def training_rate(dtype: torch.dtype, place: torch.device) -> float:
    """Floating-point operations a second of forward and backward, counted as three forward passes."""
    layer, x, step = _layer(dtype, place, BATCH)
    layer.requires_grad_(True)

    def work() -> None:
        layer.zero_grad(set_to_none=True)
        _through(layer, x, step).float().square().mean().backward()

    return 3 * _flops(layer, BATCH) / _quick(work, place)


def _layer(dtype: torch.dtype, place: torch.device, rows: int) -> tuple[nn.ModuleDict, Tensor, Step]:
    word = str(dtype).removeprefix("torch.")
    made = nn.ModuleDict(
        {
            "norm1": Norm(width=WIDTH, dtype=word),
            "attention": Attention(
                width=WIDTH,
                heads=HEADS,
                kv_heads=HEADS,
                head_dim=WIDTH // HEADS,
                rope={"rope_theta": 1e4},
                dtype=word,
            ),
            "norm2": Norm(width=WIDTH, dtype=word),
            "mlp": MLP(width=WIDTH, hidden=HIDDEN, dtype=word),
        }
    ).to_empty(device=place)
    for parameter in made.parameters():
        parameter.data.normal_(std=0.02)
    x = torch.randn(rows, LENGTH, WIDTH, device=place).to(dtype)
    return made, x, Step(torch.arange(LENGTH, device=place).expand(rows, LENGTH))


def _through(layer: nn.ModuleDict, x: Tensor, step: Step) -> Tensor:
    x = x + layer["attention"](layer["norm1"](x), step)
    out: Tensor = x + layer["mlp"](layer["norm2"](x))
    return out


def _flops(layer: nn.ModuleDict, rows: int) -> float:
    cost = layer["attention"].cost(LENGTH // 2).flops_per_token + layer["mlp"].cost().flops_per_token  # type: ignore[operator]
    return float(cost * rows * LENGTH)


def _quick(work: Callable[[], object], place: torch.device) -> float:
    seconds = []
    for run in range(_RUNS + 2):
        start = time.perf_counter()
        work()
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        if run >= 2:
            seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) // 4]  # others disturb the slower runs
