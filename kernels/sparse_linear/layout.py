"""The sparse matrix as the C kernel reads it, and its inverse.

Blocks of 64 channels in groups of columns, as in quant_linear; in a group, for every 4 columns, four vectors
of 64 weights: byte 4 c + t of a vector is channel c, column t. A vector has 64 bits, the lowest for byte 0,
and the codes of those that are set, a byte each, without the middle of the grid.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from effc.kernels.quant_linear.spec import BLOCK
from effc.kernels.sparse_linear.spec import SparseLinearSpec

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
PAST = 64
"""Bytes behind the last code that a vector may read."""


class Sparse(NamedTuple):
    """One matrix [N, K], N rounded up to 64 with zeros."""

    scales: Tensor
    """[blocks, G, 64] half precision"""
    bits: Tensor
    """[blocks, G, steps, 4] int64, 64 bits each"""
    codes: Tensor
    """uint8, those of all vectors in order"""
    starts: Tensor
    """[blocks + 1] int64: where the codes of a block begin"""

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self) - PAST


def pack(spec: SparseLinearSpec, codes: Tensor, scales: Tensor) -> Sparse:
    """codes [N, K] uint8 of a symmetric grid, scales [N, G] -> the sparse matrix."""
    one = spec.packed
    n, k = codes.shape
    fill, groups = -n % BLOCK, one.groups(k)
    wide = torch.nn.functional.pad(codes, (0, 0, 0, fill), value=one.mid)
    blocks = wide.shape[0] // BLOCK
    vectors = wide.view(blocks, 4, 16, groups, -1, 4).permute(0, 3, 4, 1, 2, 5).reshape(blocks, -1, 64)
    kept = vectors != one.mid
    shifts = torch.arange(64)
    bits = (kept.long() << shifts).sum(-1)
    stored = (vectors ^ one.mid)[kept]
    starts = torch.nn.functional.pad(kept.sum((1, 2)).cumsum(0), (1, 0))
    held = torch.nn.functional.pad(scales.to(_DTYPES[one.scale]), (0, 0, 0, fill))
    held = held.view(blocks, BLOCK, groups).transpose(1, 2).contiguous()
    there = torch.nn.functional.pad(stored, (0, PAST))
    return Sparse(held, bits.view(blocks, groups, -1, 4), there.contiguous(), starts)


def unpack(spec: SparseLinearSpec, sparse: Sparse, n: int) -> tuple[Tensor, Tensor]:
    """The inverse of `pack`: codes [N, K] uint8, scales [N, G]."""
    one = spec.packed
    blocks, groups, steps, _ = sparse.bits.shape
    kept = (sparse.bits.reshape(-1, 1) >> torch.arange(64) & 1).bool()
    vectors = torch.zeros(kept.shape, dtype=torch.uint8).masked_scatter_(kept, sparse.codes[:-PAST]) ^ one.mid
    parts = vectors.view(blocks, groups, steps, 4, 16, 4).permute(0, 3, 4, 1, 2, 5)
    codes = parts.reshape(blocks * BLOCK, -1)[:n].contiguous()
    return codes, sparse.scales.transpose(1, 2).reshape(-1, groups)[:n].contiguous()
