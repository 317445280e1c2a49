"""Run the C kernel of quant_linear on torch tensors, through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import cache
from typing import cast

import torch
from torch import Tensor

from effc.kernels.cpu.build import build, load
from effc.kernels.cpu.isa import Isa
from effc.kernels.cpu.team import TEAM
from effc.kernels.epilogue import operands
from effc.kernels.quant_linear.emit_c import emit
from effc.kernels.quant_linear.spec import QuantLinearSpec

_POINTER = ctypes.c_void_p


class _Arguments(ctypes.Structure):
    """`struct arguments` of the emitted file, field by field."""

    _fields_ = (
        ("team", _POINTER),
        ("members", ctypes.c_long),
        ("M", ctypes.c_long),
        ("N", ctypes.c_long),
        ("K", ctypes.c_long),
        ("x", _POINTER),
        ("w", _POINTER),
        ("y", _POINTER),
        ("xq", _POINTER),
        ("xs", _POINTER),
        ("xsum", _POINTER),
        ("operand", _POINTER * 4),
    )


@cache
def team(isa: Isa) -> int:
    """Address of the process's team of threads."""
    library = load(build(TEAM, isa))
    return ctypes.addressof(ctypes.c_char.in_dll(library, "effc_team"))


@cache
def compiled(spec: QuantLinearSpec, isa: Isa) -> Callable[..., None]:
    """The entry of the kernel, compiled for one instruction set."""
    entry = load(build(emit(spec), isa)).quant_linear
    entry.restype = None
    return cast(Callable[..., None], entry)


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
    more = [given[name].data_ptr() for name in operands(spec.epilogue)]
    arguments = _Arguments(
        team(isa), threads, m, n, k, x.data_ptr(), packed.data_ptr(), y.data_ptr(), xq.data_ptr(),
        scales.data_ptr(), sums.data_ptr(), (_POINTER * 4)(*more),
    )  # fmt: skip
    compiled(spec, isa)(ctypes.byref(arguments))
    return y
