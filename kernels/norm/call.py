"""Run the C kernel of norm on torch tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from effc.kernels.cpu.entry import launch
from effc.kernels.cpu.isa import Isa
from effc.kernels.norm.emit_c import emit
from effc.kernels.norm.spec import NormSpec


def norm(spec: NormSpec, isa: Isa, x: Tensor, gain: Tensor, bias: Tensor | None, threads: int) -> Tensor:
    """x [M, D], gain [D], bias [D] (None without one) -> y [M, D]; all float32 contiguous."""
    y = torch.empty_like(x)
    launch(emit(spec), spec.op, isa, threads, x, gain, bias, y, x.shape[0], x.shape[1])
    return y
