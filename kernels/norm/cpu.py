"""norm in C, as the checks of kernels/cpu/check.py see it: its cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from effc.kernels.cpu.case import Case
from effc.kernels.norm.emit_c import emit
from effc.kernels.norm.reference import reference
from effc.kernels.norm.spec import NormSpec

__all__ = ["cases", "emit", "parse"]


def parse(data: Mapping[str, Any]) -> NormSpec:
    return NormSpec.model_validate(data)


def cases(spec: NormSpec) -> Iterator[Case]:
    """Widths below a vector, of many, with and without a rest; one row so small that eps shows."""
    for m, d in ((1, 64), (3, 200), (5, 7), (4, 129)):
        dice = torch.Generator().manual_seed(d)
        x = torch.randn(m, d, generator=dice) * (1e-3 if m == 1 else 3) + 0.5 * (m > 1)
        gain, bias = (torch.randn(d, generator=dice) for _ in range(2))
        more = bias if spec.bias else None
        due = reference(spec, x.double(), gain.double(), None if more is None else more.double())
        given = {"x": x, "gain": gain, "bias": more, "y": torch.empty(m, d), "M": m, "D": d}
        yield Case(f"[{m}, {d}]", given, {"y": due}, 2e-6)
