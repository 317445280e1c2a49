"""Low-bit linear layers by torch's own packed ops: what serves where there is no C compiler.

Torch packs 4 bits in groups of 32 to 256, and 8 bits with one scale a row; both want x in bfloat16 (other
types take a path that is twenty times slower). Everything else is unpacked once and multiplied as dense
weights, which costs the memory that packing saved and no accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

GROUPS = (32, 64, 128, 256)
"""Columns a group may have in torch's 4-bit op."""


@dataclass(frozen=True, slots=True)
class TorchPacked:
    """W [N, K] as one of torch's ops reads it."""

    form: Literal["int4", "int8", "dense"]
    weight: Tensor
    scales: Tensor | None
    """int4: [K / g, N, 2] scale and zero; int8: [N]; bfloat16"""
    group: int


def pack(bits: int, q: Tensor, scales: Tensor, zeros: Tensor | None, dtype: torch.dtype) -> TorchPacked:
    """q [N, K] int8 signed, scales [N, G], zeros [N, G] int8 or None -> W = scale (q - zero).

    `dtype` is that of dense weights, where no op fits.
    """
    n, k = q.shape
    groups = scales.shape[1]
    group = k // groups
    zero = torch.zeros_like(scales, dtype=torch.float32) if zeros is None else zeros.float()
    if bits == 4 and group in GROUPS and n % 16 == 0 and scales.shape[0] == n:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int() + 8, 1)
        both = torch.stack((scales.float().t(), (-zero * scales.float()).t()), -1)
        return TorchPacked("int4", packed, both.to(torch.bfloat16).contiguous(), group)
    if bits == 8 and zeros is None and scales.shape == (n, 1):
        return TorchPacked("int8", q.contiguous(), scales[:, 0].to(torch.bfloat16).contiguous(), k)
    wide = q.float().view(n, groups, -1) - zero.unsqueeze(-1)
    return TorchPacked("dense", (wide * scales.float().unsqueeze(-1)).view(n, k).to(dtype), None, group)


def linear(x: Tensor, packed: TorchPacked) -> Tensor:
    """x [..., K] -> [..., N] in x's dtype; int4 and int8 round x to bfloat16 first."""
    if packed.form == "dense":
        return F.linear(x, packed.weight.to(x.dtype))
    rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
    if packed.form == "int4":
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed.weight, packed.group, packed.scales)
    else:
        y = torch.ops.aten._weight_int8pack_mm(rows, packed.weight, packed.scales)
    out: Tensor = y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])
    return out
