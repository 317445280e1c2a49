"""binary_planes in C, as the checks of kernels/cpu/check.py see it: its cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from effc.kernels.binary_planes.emit_c import emit
from effc.kernels.binary_planes.layout import pack
from effc.kernels.binary_planes.reference import example, reference
from effc.kernels.binary_planes.spec import BinaryPlanesSpec
from effc.kernels.cpu.case import Argument, Case
from effc.kernels.epilogue import operands

__all__ = ["cases", "emit", "parse"]


def parse(data: Mapping[str, Any]) -> BinaryPlanesSpec:
    return BinaryPlanesSpec.model_validate(data)


def cases(spec: BinaryPlanesSpec) -> Iterator[Case]:
    """Rows that fill no block and several, columns that fill no word; runs where few share scales."""
    for m, n, k in ((1, 70, 77), (3, 330, 64), (2, 21, 33)):
        if spec.share:
            n, k = (2 * spec.share, k) if spec.side == "columns" else (n, 2 * spec.share)
        x, signs, scales = example(spec, m, n, k, seed=m)
        words, laid = pack(spec, signs, scales)
        runs = scales.shape[2] if spec.side == "columns" else 1
        shapes = {"bias": (n,), "residual": (m, n), "gate": (m, n), "row_scale": (m,)}
        dice = torch.Generator().manual_seed(k)
        more = {name: torch.randn(shapes[name], generator=dice) for name in operands(spec.epilogue)}
        given: dict[str, Argument] = {"x": x, "words": words, "scales": laid}
        given |= {"y": torch.empty(m, n), "M": m, "N": n, "K": k, "runs": runs}
        given |= more
        due = reference(spec, x, signs, scales, more)
        yield Case(f"[{m}, {k}] times [{n}, {k}]", given, {"y": due}, 4e-6)
