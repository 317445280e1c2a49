"""Run the C kernel of dense_linear on torch tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from effc.kernels.cpu.entry import launch
from effc.kernels.cpu.isa import Isa
from effc.kernels.dense_linear.emit_c import emit
from effc.kernels.dense_linear.spec import DenseLinearSpec
from effc.kernels.epilogue import operands


def dense_linear(
    spec: DenseLinearSpec,
    isa: Isa,
    x: Tensor,
    w: Tensor,
    w2: Tensor | None,
    given: Mapping[str, Tensor],
    threads: int,
) -> Tensor:
    """x [M, K] float32, w (and w2 when paired) [N, K] as the spec says -> y [M, N] float32; all contiguous.

    `given` holds the operands of the epilogue, float32.
    """
    (m, k), n = x.shape, w.shape[0]
    y = torch.empty(m, n)
    more = [given[name] for name in operands(spec.epilogue)]
    launch(emit(spec), spec.op, isa, threads, x, w, w2, y, m, n, k, *more)
    return y
