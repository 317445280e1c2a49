"""gated on a GPU, as the checks of kernels/gpu/check.py see it: the definition and its cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effc.kernels.gated.emit_triton import GatedSpec, emit
from effc.kernels.gpu.check import Case

__all__ = ["cases", "emit", "launches", "parse", "reference"]


def parse(data: Mapping[str, Any]) -> GatedSpec:
    return GatedSpec.model_validate(data)


def reference(spec: GatedSpec, x: Tensor) -> Tensor:
    """x [M, 2 F] -> y [M, F] in the precision of x"""
    first, second = x.chunk(2, -1)
    act = F.silu(first) if spec.activation == "silu" else F.gelu(first, approximate="tanh")
    return act * second


def cases(spec: GatedSpec) -> Iterator[Case]:
    """Rows that fill a block, that do not, and that need two."""
    for m, width in ((1, 1024), (3, 128), (2, 1152)):
        yield from _pair(spec, m, width, seed=m)


def launches(spec: GatedSpec) -> Iterator[Case]:
    """The width of a usual model."""
    yield from _pair(spec, 3, 2048, seed=0)


def _pair(spec: GatedSpec, m: int, width: int, seed: int) -> Iterator[Case]:
    dice = torch.Generator().manual_seed(seed)
    x = (torch.randn(m, 2 * width, generator=dice) * 2).bfloat16()
    dy = torch.randn(m, width, generator=dice).bfloat16()
    leaf = x.double().requires_grad_()
    y = reference(spec, leaf)

    def forward() -> dict[str, Tensor]:
        due = {"y": y.detach()}
        return due | ({"sums": due["y"].view(m, -1, spec.run).sum(-1).t()} if spec.run else {})

    def backward() -> dict[str, Tensor]:
        (dx,) = torch.autograd.grad(y, [leaf], dy.double(), retain_graph=True)
        return {"dx": dx}

    yield Case(f"forward [{m}, {width}]", {"x": x}, forward, 2e-5, entry="forward")
    yield Case(f"backward [{m}, {width}]", {"dy": dy, "x": x}, backward, 2e-5, entry="backward")
