"""Adapters side by side: the factors of all in two matrices, ranks mixed and nothing filled up.

A [S, K] and B [S, N], S the sum of their ranks: adapter i has rows first[i] to first[i + 1] of both. Behind
the last stands one of rank 0, for rows without an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Adapters(NamedTuple):
    """Adapters of one linear layer."""

    a: Tensor
    """[S, K]"""
    b: Tensor
    """[S, N]"""
    first: Tensor
    """[A + 2] int32"""
    scales: Tensor
    """[A + 1] float32; that of no adapter is 0"""

    @property
    def rank(self) -> int:
        """The largest."""
        return int(self.first.diff().max())


def pack(factors: Sequence[tuple[Tensor, Tensor, float]]) -> Adapters:
    """(A_i [r_i, K], B_i [N, r_i], s_i) for every adapter -> their layout.

    Raises:
        ValueError: there are none, or their shapes do not fit each other.
    """
    if not factors:
        raise ValueError("no adapters")
    k, n = factors[0][0].shape[1], factors[0][1].shape[0]
    for i, (a, b, _) in enumerate(factors):
        if a.shape[1] != k or b.shape[0] != n or a.shape[0] != b.shape[1]:
            shapes = f"{list(a.shape)} and {list(b.shape)}"
            raise ValueError(f"adapter {i} has factors {shapes}, which do not fit [{n}, {k}]")
    ranks = torch.tensor([0, *(a.shape[0] for a, _, _ in factors), 0])
    return Adapters(
        torch.cat([a for a, _, _ in factors]).contiguous(),
        torch.cat([b.t() for _, b, _ in factors]).contiguous(),
        ranks.cumsum(0).int(),
        torch.tensor([*(s for _, _, s in factors), 0.0]),
    )


def unpack(adapters: Adapters) -> list[tuple[Tensor, Tensor, float]]:
    """The inverse of `pack`."""
    edges = adapters.first.tolist()
    return [
        (adapters.a[start:end], adapters.b[start:end].t(), float(scale))
        for start, end, scale in zip(edges[:-2], edges[1:-1], adapters.scales.tolist(), strict=False)
    ]
