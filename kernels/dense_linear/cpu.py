"""dense_linear in C, as the checks of kernels/cpu/check.py see it: its cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from effc.kernels.cpu.case import Argument, Case
from effc.kernels.cpu.stored import DTYPES
from effc.kernels.dense_linear.emit_c import emit
from effc.kernels.dense_linear.reference import reference
from effc.kernels.dense_linear.spec import DenseLinearSpec
from effc.kernels.epilogue import operands

__all__ = ["cases", "emit", "parse"]


def parse(data: Mapping[str, Any]) -> DenseLinearSpec:
    return DenseLinearSpec.model_validate(data)


def cases(spec: DenseLinearSpec) -> Iterator[Case]:
    """Rows of every tile and of panels, channels and columns that fill no vector, columns in two chunks."""
    for m, n, k in ((1, 37, 100), (2, 16, 7), (8, 35, 33), (5, 20, 530), (66, 83, 9), (65, 20, 1050)):
        dice = torch.Generator().manual_seed(m)
        x = torch.randn(m, k, generator=dice)
        w, w2 = (torch.randn(n, k, generator=dice).div(k**0.5).to(DTYPES[spec.weight]) for _ in range(2))
        second = w2 if spec.paired else None
        shapes = {"bias": (n,), "residual": (m, n), "gate": (m, n), "row_scale": (m,)}
        more: dict[str, Tensor] = {
            name: torch.randn(shapes[name], generator=dice) for name in operands(spec.epilogue)
        }
        due = reference(spec, x.double(), w.double(), None if second is None else second.double(), more)
        given: dict[str, Argument] = {"x": x, "w": w, "w2": second, "y": torch.empty(m, n)}
        yield Case(f"[{m}, {k}] times [{n}, {k}]", given | {"M": m, "N": n, "K": k} | more, {"y": due}, 2e-6)
