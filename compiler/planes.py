"""Planes: a matrix as a sum of signs times scales, and how signs and scales are stored.

Shapes: W [o, i] = sum_p a_p b_p over P planes; signs b_p in {-1, 1}; scales a_p, one for each of A runs of
o / A rows and B runs of i / B columns. Stored: signs [P, o, ceil(i / 8)] uint8, bit j % 8 of byte j / 8 set
where b = 1; scales [P, t, A, B], int8 exponents of t powers of two that add up, or one float16.
"""

from __future__ import annotations

import torch
from torch import Tensor

NONE = -128
"""The exponent of no power at all: the term is zero."""
LEAST, MOST = -126, 127
"""Exponents that a float32 which is not subnormal has."""


def pack_signs(signs: Tensor) -> Tensor:
    """signs [P, o, i] of -1 and 1 -> [P, o, ceil(i / 8)] uint8; bits behind the last column are zero"""
    up = torch.nn.functional.pad((signs > 0).to(torch.uint8), (0, -signs.shape[-1] % 8))
    packed: Tensor = (up.unflatten(-1, (-1, 8)) << _places(signs)).sum(-1).to(torch.uint8)
    return packed


def unpack_signs(packed: Tensor, columns: int) -> Tensor:
    """packed [P, o, ceil(i / 8)] uint8 -> signs [P, o, i] int8"""
    bits = (packed.unsqueeze(-1) >> _places(packed)) & 1
    return 2 * bits.flatten(-2)[..., :columns].to(torch.int8) - 1


def scale_values(scales: Tensor) -> Tensor:
    """Stored scales [P, t, A, B] -> a [P, A, B] float32"""
    if scales.dtype != torch.int8:
        return scales.float().sum(1)
    powers = torch.ldexp(torch.ones_like(scales, dtype=torch.float32), scales.int())
    return torch.where(scales == NONE, 0.0, powers).sum(1)


def dense(packed: Tensor, scales: Tensor, columns: int) -> Tensor:
    """Stored signs and scales -> W [o, i] float32, planes added in order"""
    signs, a = unpack_signs(packed, columns), scale_values(scales)
    planes, rows, _ = signs.shape
    total = torch.zeros(rows, columns)
    for p in range(planes):
        tiles = signs[p].float().view(a.shape[1], rows // a.shape[1], a.shape[2], columns // a.shape[2])
        total += (tiles * a[p][:, None, :, None]).view(rows, columns)
    return total


def _places(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)
