"""sparse_linear in C, as the checks of kernels/cpu/check.py see it: its cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from effc.kernels.cpu.case import Argument, Case
from effc.kernels.epilogue import operands
from effc.kernels.quant_linear.reference import quantize_rows, reference
from effc.kernels.quant_linear.spec import BLOCK
from effc.kernels.sparse_linear.emit_c import emit
from effc.kernels.sparse_linear.layout import pack
from effc.kernels.sparse_linear.spec import SparseLinearSpec

__all__ = ["cases", "emit", "parse"]


def parse(data: Mapping[str, Any]) -> SparseLinearSpec:
    return SparseLinearSpec.model_validate(data)


def example(spec: SparseLinearSpec, n: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """codes [N, K] and scales [N, G]: rows of two of four, of about a third, and one of no zeros at all."""
    dice, one = torch.Generator().manual_seed(seed), spec.packed
    codes = torch.randint(0, 1 << one.bits, (n, k), generator=dice, dtype=torch.uint8)
    order = torch.rand(n, k // 4, 4, generator=dice).argsort(-1).view(n, k)
    few = torch.rand(n, k, generator=dice) < 0.7
    zero = torch.where((torch.arange(n) % 2 == 0).unsqueeze(1), order < 2, few)
    zero[-1] = False
    kind = {"float16": torch.float16, "bfloat16": torch.bfloat16}[one.scale]
    scales = (torch.rand(n, one.groups(k), generator=dice) * 0.02 + 0.01).to(kind)
    return codes.masked_fill(zero, one.mid), scales


def cases(spec: SparseLinearSpec) -> Iterator[Case]:
    """Fewer rows than go together and more, the number from which blocks are written out; ragged channels."""
    one = spec.packed
    for m, n in ((1, 96), (5, 32)) if one.paired else ((1, 70), (3, 64), (7, 131)):
        dice = torch.Generator().manual_seed(m)
        k, rows = 2 * one.group or 136, 2 * n if one.paired else n
        codes, scales = example(spec, rows, k, m)
        order = torch.arange(rows)
        if one.paired:  # 32 rows of the first half, 32 of the second
            order = order.view(2, -1, 32).transpose(0, 1).reshape(-1)
        sparse = pack(spec, codes[order], scales[order])
        x = torch.randn(m, k, generator=dice)
        xq, xs = quantize_rows(x, one.groups(k))
        shapes = {"bias": (n,), "residual": (m, n), "gate": (m, n), "row_scale": (m,)}
        more: dict[str, Tensor] = {
            name: torch.randn(shapes[name], generator=dice) for name in operands(one.epilogue)
        }
        due = reference(one, x, codes, scales, None, more)
        given: dict[str, Argument] = {"xq": xq, "xs": xs}
        given |= {"xsum": xq.view(m, one.groups(k), -1).sum(-1, dtype=torch.int32)}
        given |= sparse._asdict() | {"y": torch.empty(m, n)} | more
        given |= {"M": m, "N": n, "K": k, "blocks": -(-rows // BLOCK)}
        yield Case(f"[{m}, {k}] times [{n}, {k}]", given, {"y": due}, 4e-7)
