"""The definition of embed in plain torch, in the order in which the kernel adds."""

from __future__ import annotations

import torch
from torch import Tensor

from effc.kernels.embed.spec import EmbedSpec
from effc.kernels.quant_linear.layout import unpack


def reference(
    spec: EmbedSpec,
    ids: Tensor,
    table: Tensor,
    place: Tensor | None = None,
    positions: Tensor | None = None,
    types: Tensor | None = None,
) -> Tensor:
    """ids [M], table [V, D] or packed, place [M], positions [P, D], types [D] -> x [M, D] float32."""
    x = (table if spec.packed is None else dense(spec, table))[ids].float() * spec.scale
    if types is not None:
        x = x + types.float()
    if positions is not None and place is not None:
        x = x + positions[place + spec.position_offset].float()
    return x


def dense(spec: EmbedSpec, packed: Tensor) -> Tensor:
    """The packed table as numbers [V', D] float32, V' a multiple of 64."""
    if spec.packed is None:
        raise ValueError("the table is not packed")
    codes, scales, zeros = unpack(spec.packed, packed, packed.shape[0] * 64)
    rows, groups = scales.shape
    base = torch.tensor(spec.packed.mid) if zeros is None else zeros.float().unsqueeze(-1)
    return ((codes.view(rows, groups, -1) - base.float()) * scales.float().unsqueeze(-1)).view(rows, -1)
