"""embed in C, as the checks of kernels/cpu/check.py see it: its cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from effc.kernels.cpu.case import Argument, Case
from effc.kernels.cpu.stored import DTYPES
from effc.kernels.embed.emit_c import emit
from effc.kernels.embed.reference import reference
from effc.kernels.embed.spec import EmbedSpec
from effc.kernels.quant_linear.layout import pack

__all__ = ["cases", "emit", "parse"]

ROWS = 70
"""Rows of the table: one block of packed ones and a part of the next."""


def parse(data: Mapping[str, Any]) -> EmbedSpec:
    return EmbedSpec.model_validate(data)


def cases(spec: EmbedSpec) -> Iterator[Case]:
    """First and last rows of every table; widths that fill no vector where rows are not packed."""
    layout = spec.packed
    for m, d in ((1, 64), (9, 45)) if layout is None else ((1, 64), (9, 2 * layout.group or 132)):
        dice = torch.Generator().manual_seed(d)
        if layout is None:
            table = torch.randn(ROWS, d, generator=dice).to(DTYPES[spec.table or ""])
        else:
            groups = layout.groups(d)
            codes = torch.randint(0, 1 << layout.bits, (ROWS, d), generator=dice, dtype=torch.uint8)
            scales = (torch.rand(ROWS, groups, generator=dice) + 0.1).to(DTYPES[layout.scale])
            zeros = torch.randint(0, 1 << layout.bits, (ROWS, groups), generator=dice, dtype=torch.uint8)
            table = pack(layout, codes, scales, None if layout.symmetric else zeros)
        ids, place = (torch.randint(0, n, (m,), generator=dice) for n in (ROWS, 20))
        ids[0], place[0] = ROWS - 1, 19
        positions = torch.randn(20 + spec.position_offset, d, generator=dice)
        added = positions.to(DTYPES[spec.positions]) if spec.positions else None
        types = torch.randn(d, generator=dice).to(DTYPES[spec.types]) if spec.types else None
        given: dict[str, Argument] = {"ids": ids, "place": place, "table": table, "positions": added}
        given |= {"types": types, "x": torch.empty(m, d), "M": m, "D": d}
        due = reference(spec, ids, table, place, added, types)
        # one rounding less where a product and a sum are fused
        yield Case(f"[{m}, {d}]", given, {"x": due}, 2e-7 if spec.scale != 1.0 else 0.0)
