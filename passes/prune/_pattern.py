"""Which weights go: the lowest scores of a row, of a tensor, of all tensors, or of each group n:m, counted
exactly.

Shapes: scores [R, i]; the answer is a mask [R, i], True where a weight is set to zero. Of equal scores the
first go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
    """The `count` lowest scores of each row. They are float32 and not negative."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    if count:
        rows = max(1, CHUNK // max(1, scores.shape[1]))
        for some, gone in zip(scores.split(rows), mask.split(rows), strict=True):
            _mark(some, count, gone)
    return mask


def _mark(scores: Tensor, count: int, gone: Tensor) -> None:
    """Set the lowest scores of each row in the mask `gone`, in pieces: a row may be a whole matrix."""
    if scores.numel() > CHUNK:
        edge = _kth(scores, count)
    else:
        edge = scores.kthvalue(count, dim=1, keepdim=True).values
    left = torch.full((scores.shape[0], 1), count)
    pieces = list(zip(scores.split(CHUNK, 1), gone.split(CHUNK, 1), strict=True))
    for piece, mark in pieces:
        torch.lt(piece, edge, out=mark)
        left -= mark.sum(1, keepdim=True)
    for piece, mark in pieces:
        equal = piece == edge
        first = equal & (equal.cumsum(1, dtype=torch.int32) <= left)
        mark |= first
        left -= first.sum(1, keepdim=True)


def lowest_in_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """In each group of m neighbors of a row the m - n lowest."""
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    rows = max(1, CHUNK // max(1, scores.shape[1]))
    for some, gone in zip(scores.split(rows), mask.split(rows), strict=True):
        order = some.reshape(some.shape[0], -1, m).argsort(dim=-1, stable=True)
        gone.view(some.shape[0], -1, m).scatter_(-1, order[..., : m - n], True)
    return mask


def counts_over_all(sizes: Sequence[int], scores: Sequence[Callable[[], Tensor]], count: int) -> list[int]:
    """How many of the lowest scores in each tensor make the `count` lowest of all, none going above 1 -
    FLOOR. `sizes` are the numbers of scores; `scores` give them, one tensor in memory at a time.

    Scores are float32 and not negative, so their order is that of their bits: two histograms of 16 bits find
    the edge without sorting. A tensor at its limit keeps it, and the rest of the count falls on the others.
    """
    limits = [min(n - -(-int(n * FLOOR * 1e6) // 10**6), n - 1) for n in sizes]
    found = [0] * len(sizes)
    free = set(range(len(sizes)))
    while free:
        left = count - sum(limits[i] for i in range(len(sizes)) if i not in free)
        split = _split({i: scores[i] for i in sorted(free)}, left)
        over = {i for i, taken in split.items() if taken > limits[i]}
        for i, taken in split.items():
            found[i] = min(taken, limits[i])
        if not over:
            break
        free -= over
    return found


def _split(scores: Mapping[int, Callable[[], Tensor]], count: int) -> dict[int, int]:
    """How many of the `count` lowest numbers of all lie in each tensor; of equal ones the first."""
    if count <= 0 or not scores:
        return dict.fromkeys(scores, 0)
    top, before = _edge(_total(_upper(read()) for read in scores.values()), count)
    rest, _ = _edge(_total(_lower(read(), top) for read in scores.values()), count - before)
    taken, equal = {}, {}
    for i, read in scores.items():
        taken[i], equal[i] = _around(read(), (top << 16) | rest)
    missing = count - sum(taken.values())
    for i, most in equal.items():
        more = min(missing, most)
        taken[i] += more
        missing -= more
    return taken


def _kth(scores: Tensor, count: int) -> Tensor:
    """The number `count` (from 1) of all scores in rising order, as one number."""
    top, before = _edge(_upper(scores), count)
    rest, _ = _edge(_lower(scores, top), count - before)
    return torch.tensor((top << 16) | rest, dtype=torch.int32).view(torch.float32)


def _upper(scores: Tensor) -> Tensor:
    """How many scores have each value of the upper 16 bits."""
    return _total(torch.bincount(b >> 16, minlength=1 << 16) for b in _bits(scores))


def _lower(scores: Tensor, top: int) -> Tensor:
    """The same of the lower 16 bits, of the scores whose upper ones are `top`."""
    return _total(torch.bincount(b[b >> 16 == top] & 0xFFFF, minlength=1 << 16) for b in _bits(scores))


def _around(scores: Tensor, edge: int) -> tuple[int, int]:
    """How many scores lie below those bits, and how many have them."""
    counts = [(int((b < edge).sum()), int((b == edge).sum())) for b in _bits(scores)]
    return sum(below for below, _ in counts), sum(equal for _, equal in counts)


def _bits(scores: Tensor) -> Sequence[Tensor]:
    """The bits of scores [...] float32 as integers, which have the same order, in pieces."""
    pieces: Sequence[Tensor] = scores.flatten().view(torch.int32).split(CHUNK)
    return pieces


def _total(histograms: Iterable[Tensor]) -> Tensor:
    total = torch.zeros(1 << 16, dtype=torch.int64)
    for histogram in histograms:
        total += histogram
    return total


def _edge(histogram: Tensor, count: int) -> tuple[int, int]:
    """The bin in which the number `count` lies (from 1), and how many lie in bins before it."""
    upto = histogram.cumsum(0)
    place = int(torch.searchsorted(upto, count))
    return place, int(upto[place] - histogram[place])
