"""Run the C kernel of binary_planes on torch tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from effc.kernels.binary_planes.emit_c import emit
from effc.kernels.binary_planes.spec import BinaryPlanesSpec
from effc.kernels.cpu.entry import launch
from effc.kernels.cpu.isa import Isa
from effc.kernels.epilogue import operands


def binary_planes(
    spec: BinaryPlanesSpec,
    isa: Isa,
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    n: int,
    given: Mapping[str, Tensor],
    threads: int,
) -> Tensor:
    """x [M, K] float32 contiguous, words and scales as in layout.py -> y [M, n] float32.

    `given` holds the operands of the epilogue, float32 contiguous.
    """
    m, k = x.shape
    runs = scales.shape[2] if spec.side == "columns" else 1
    y = torch.empty(m, n)
    more = [given[name] for name in operands(spec.epilogue)]
    launch(emit(spec), spec.op, isa, threads, x, words, scales, y, m, n, k, runs, *more)
    return y
