"""Run the C kernel of quant_linear on torch tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from effc.kernels.cpu.entry import launch
from effc.kernels.cpu.isa import Isa
from effc.kernels.epilogue import operands
from effc.kernels.quant_linear.emit_c import emit
from effc.kernels.quant_linear.spec import QuantLinearSpec


def quant_linear(
    spec: QuantLinearSpec,
    isa: Isa,
    x: Tensor,
    packed: Tensor,
    n: int,
    given: Mapping[str, Tensor],
    threads: int,
) -> Tensor:
    """x [M, K] float32 contiguous, packed as in layout.py -> y [M, n] float32.

    `given` holds the operands of the epilogue, float32 contiguous.
    """
    m, k = x.shape
    groups = spec.groups(k)
    y = torch.empty(m, n)
    xq = torch.empty(m, k, dtype=torch.int8)
    scales, sums = torch.empty(m, groups), torch.empty(m, groups, dtype=torch.int32)
    more = [given[name] for name in operands(spec.epilogue)]
    launch(emit(spec), spec.op, isa, threads, m, n, k, x, packed, y, xq, scales, sums, *more)
    return y
