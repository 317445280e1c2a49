"""Two of four as the Triton kernel reads them, the inverse, and the order of x's columns that goes with them.

A turn has 128 columns, 32 quads. Its words are 16 pairs of first values and 16 pairs of second values, of
quads 2 r and 2 r + 1. Bits 4 t to 4 t + 3 of word r of a block of four turns say which members of quad 2 r of
turn t are stored, two of them always; the same bits of the upper half those of quad 2 r + 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from effc.kernels.quant_linear.spec_gpu import ROWS
from effc.kernels.sparse_linear.spec_gpu import COLUMNS, TURNS, padded

QUADS = COLUMNS // 4


class Half(NamedTuple):
    """One matrix [N, K]; N' is N rounded up to 128, K' is K rounded up to 512."""

    values: Tensor
    """[N', K' / 4] int32, pairs of bfloat16"""
    places: Tensor
    """[N', K' / 32] int32"""


def pack(w: Tensor) -> Half:
    """w [N, K] bfloat16 -> Half

    Raises:
        ValueError: a quad has more than two numbers that are not zero.
    """
    n, k = w.shape
    rows, wide = -(-n // ROWS) * ROWS, padded(k)
    quads = torch.nn.functional.pad(w, (0, wide - k, 0, rows - n)).view(rows, -1, 4)
    many = (quads != 0).sum(-1) > 2
    if many.any():
        row, quad = many.nonzero()[0].tolist()
        raise ValueError(f"columns {4 * quad} to {4 * quad + 3} of row {row} have more than two numbers")
    kept = quads.abs().float().topk(2, dim=-1).indices.sort(-1).values
    stored = quads.gather(-1, kept).view(rows, -1, QUADS, 2).transpose(-1, -2).contiguous()
    bits = (1 << kept).sum(-1).view(rows, -1, TURNS, QUADS // 2, 2)
    shifts = torch.arange(TURNS).mul(4).view(-1, 1, 1) + torch.tensor([0, 16])
    words = (bits << shifts.to(bits.device)).sum((2, 4)).view(rows, -1)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return Half(stored.view(rows, -1).view(torch.int32), words)


def unpack(half: Half, n: int, k: int) -> Tensor:
    """The inverse of `pack`: w [n, k] bfloat16."""
    rows = half.values.shape[0]
    stored = half.values.view(torch.bfloat16).view(rows, -1, 2, QUADS).transpose(-1, -2).reshape(rows, -1, 2)
    shifts = torch.arange(TURNS).mul(4).view(-1, 1, 1) + torch.tensor([0, 16])
    bits = (half.places.view(rows, -1, 1, QUADS // 2, 1).long() >> shifts) & 15
    there = ((bits.reshape(rows, -1, 1) >> torch.arange(4)) & 1).bool()
    w = torch.zeros(there.shape, dtype=torch.bfloat16)
    w[there] = stored.flatten()
    return w.view(rows, -1)[:n, :k].contiguous()


def by_members(x: Tensor) -> Tensor:
    """x [M, K] -> the same columns, in each turn first members of all quads, then second ones, and so on."""
    return x.view(x.shape[0], -1, QUADS, 4).transpose(-1, -2).reshape(x.shape)
