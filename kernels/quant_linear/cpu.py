"""quant_linear in C, as the checks of kernels/cpu/check.py see it: its cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from effc.kernels.cpu.case import Argument, Case
from effc.kernels.epilogue import operands
from effc.kernels.quant_linear.emit_c import emit
from effc.kernels.quant_linear.layout import pack
from effc.kernels.quant_linear.reference import reference
from effc.kernels.quant_linear.spec import QuantLinearSpec

__all__ = ["cases", "emit", "parse"]


def parse(data: Mapping[str, Any]) -> QuantLinearSpec:
    return QuantLinearSpec.model_validate(data)


def cases(spec: QuantLinearSpec) -> Iterator[Case]:
    """Rows fewer than a tile's and more, channels that fill no block, whole rows that fill no vector."""
    for m, n in ((1, 96), (2, 32), (18, 96)) if spec.paired else ((1, 70), (5, 64), (21, 131)):
        yield _case(spec, m, n, 2 * spec.group or (192 if m > 9 else 4 * 33))


def _case(spec: QuantLinearSpec, m: int, n: int, k: int) -> Case:
    dice = torch.Generator().manual_seed(m)
    rows, groups = 2 * n if spec.paired else n, spec.groups(k)
    codes = torch.randint(0, 1 << spec.bits, (rows, k), generator=dice, dtype=torch.uint8)
    kind = {"float16": torch.float16, "bfloat16": torch.bfloat16}[spec.scale]
    scales = (torch.rand(rows, groups, generator=dice) * 0.02 + 0.01).to(kind)
    zeros = torch.randint(0, 1 << spec.bits, (rows, groups), generator=dice, dtype=torch.uint8)
    order = torch.arange(rows)
    if spec.paired:  # 32 rows of the first half, 32 of the second
        order = order.view(2, -1, 32).transpose(0, 1).reshape(-1)
    packed = pack(spec, codes[order], scales[order], None if spec.symmetric else zeros[order])
    x = torch.randn(m, k, generator=dice)
    shapes = {"bias": (n,), "residual": (m, n), "gate": (m, n), "row_scale": (m,)}
    more: dict[str, Tensor] = {
        name: torch.randn(shapes[name], generator=dice) for name in operands(spec.epilogue)
    }
    given: dict[str, Argument] = {"M": m, "N": n, "K": k, "x": x, "w": packed, "y": torch.empty(m, n)}
    given |= {"xq": torch.empty(m, k, dtype=torch.int8), "xs": torch.empty(m, groups)}
    given |= {"xsum": torch.empty(m, groups, dtype=torch.int32)} | more
    due = reference(spec, x, codes, scales, None if spec.symmetric else zeros, more)
    return Case(f"[{m}, {k}] times [{n}, {k}]", given, {"y": due}, 4e-7, ("xq", "xs", "xsum"))
