"""Which weights go: the lowest scores of a row, of a tensor, of all tensors, or of each group n:m, counted
exactly.

Shapes: scores [R, i]; the answer is a mask [R, i], True where a weight is set to zero. Of equal scores the
first go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Pattern = Literal["unstructured", "2:4", "4:8"]

FLOOR = 0.01
"""Share of every tensor that stays, however small its weights, when one threshold serves all tensors."""

CHUNK = 1 << 20
"""Scores that are ordered at once; an order takes many times the memory of what it orders."""


def sides(pattern: str) -> tuple[int, int]:
    """(n, m) of a pattern n:m: n of m neighboring inputs stay."""
    n, _, m = pattern.partition(":")
    return int(n), int(m)


def share_of(count: int, sparsity: float) -> int:
    """floor(sparsity * count), unharmed by the rounding of sparsity."""
    return int(sparsity * count + 1e-9)


def lowest(scores: Tensor, count: int) -> Tensor:
    """The `count` lowest scores of each row."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    edge = scores.kthvalue(count, dim=1, keepdim=True).values
    below, equal = scores < edge, scores == edge
    missing = count - below.sum(1, keepdim=True)
    narrow = torch.int32 if scores.shape[1] < 1 << 31 else torch.int64
    return below.logical_or_(equal.logical_and_(equal.cumsum(1, dtype=narrow) <= missing))


def lowest_in_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """In each group of m neighbors of a row the m - n lowest."""
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    rows = max(1, CHUNK // max(1, scores.shape[1]))
    for some, gone in zip(scores.split(rows), mask.split(rows), strict=True):
        order = some.reshape(some.shape[0], -1, m).argsort(dim=-1, stable=True)
        gone.view(some.shape[0], -1, m).scatter_(-1, order[..., : m - n], True)
    return mask


def counts_over_all(tensors: Sequence[Tensor], count: int) -> list[int]:
    """How many of the lowest scores in each tensor make the `count` lowest of all, none going above 1 -
    FLOOR.

    Scores are float32 and not negative, so their order is that of their bits: two histograms of 16 bits find
    the edge without sorting. A tensor at its limit keeps it, and the rest of the count falls on the others.
    """
    limits = [t.numel() - -(-int(t.numel() * FLOOR * 1e6) // 10**6) for t in tensors]
    limits = [min(limit, t.numel() - 1) for limit, t in zip(limits, tensors, strict=True)]
    found = [0] * len(tensors)
    free = set(range(len(tensors)))
    while free:
        left = count - sum(limits[i] for i in range(len(tensors)) if i not in free)
        split = _split({i: tensors[i] for i in sorted(free)}, left)
        over = {i for i, taken in split.items() if taken > limits[i]}
        for i, taken in split.items():
            found[i] = min(taken, limits[i])
        if not over:
            break
        free -= over
    return found


def _split(tensors: dict[int, Tensor], count: int) -> dict[int, int]:
    """How many of the `count` lowest numbers of all lie in each tensor; of equal ones the first."""
    if count <= 0 or not tensors:
        return dict.fromkeys(tensors, 0)
    bits = {i: t.flatten().view(torch.int32) for i, t in tensors.items()}
    high = sum(torch.bincount(b >> 16, minlength=1 << 16) for b in bits.values())
    top, before = _edge(torch.as_tensor(high), count)
    inside = {i: b[(b >> 16) == top] & 0xFFFF for i, b in bits.items()}
    low = sum(torch.bincount(b, minlength=1 << 16) for b in inside.values())
    rest, _ = _edge(torch.as_tensor(low), count - before)
    edge = (top << 16) | rest
    taken = {i: int((b < edge).sum()) for i, b in bits.items()}
    missing = count - sum(taken.values())
    for i, b in bits.items():
        more = min(missing, int((b == edge).sum()))
        taken[i] += more
        missing -= more
    return taken


def _edge(histogram: Tensor, count: int) -> tuple[int, int]:
    """The bin in which the number `count` lies (from 1), and how many lie in bins before it."""
    upto = histogram.cumsum(0)
    place = int(torch.searchsorted(upto, count))
    return place, int(upto[place] - histogram[place])
