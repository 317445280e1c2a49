"""Places of S as the kernels read them: a bit for each, and how many come before each run of 64 columns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from effc.kernels.sparse_low_rank.spec import BLOCK


class Support(NamedTuple):
    """Made once from the places of S [N, K]."""

    bits: Tensor
    """[N, K / 32] int32, bit j of word w set where column 32 w + j has a number"""
    before: Tensor
    """[N, K / 64] int32, numbers before each run of 64 columns, row after row"""
    order: Tensor
    """[n] int64: number i in this order is values[order[i]]"""


def pack(places: Tensor, n: int, k: int) -> Support:
    """places [n] of the flattened S, each once -> Support

    Raises:
        ValueError: a place is there twice, or outside S, or K is no multiple of 64.
    """
    if k % BLOCK:
        raise ValueError(f"K = {k} is not a multiple of {BLOCK}")
    flat, order = places.long().sort()
    if flat.numel() and (int(flat[0]) < 0 or int(flat[-1]) >= n * k or bool((flat[1:] == flat[:-1]).any())):
        raise ValueError(f"places are not {flat.numel()} different ones of {n * k}")
    up = torch.zeros(n * k, dtype=torch.int64, device=places.device)
    up[flat] = 1
    words = (up.view(n, -1, 32) << torch.arange(32, device=places.device)).sum(-1)
    count = up.view(-1, BLOCK).sum(-1)
    before = (count.cumsum(0) - count).view(n, -1)
    return Support(torch.where(words >= 2**31, words - 2**32, words).int(), before.int(), order)


def unpack(support: Support, n: int) -> Tensor:
    """Support of S with n rows -> places in order"""
    bits = (support.bits.long()[:, :, None] >> torch.arange(32, device=support.bits.device)) & 1
    return bits.view(-1).nonzero().view(-1)
