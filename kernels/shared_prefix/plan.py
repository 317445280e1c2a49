"""Plan: which program reads which part of which segment for whom, made once for a tree of segments.

A plan holds while the tree is the same. Segments may grow up to the length that they were planned with, since
programs read where they begin and end from memory, so that one captured graph serves many steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from effc.kernels.shared_prefix.spec import FEW, MANY, SharedPrefixSpec


class Plan(NamedTuple):
    """An edge is a segment of a sequence's path; edges lie by segment. All int32."""

    few: Tensor
    """[n, 5] of segments with few rows: segment, first edge, edges, share of the segment, shares"""
    many: Tensor
    """[n, 5] of those with many"""
    row: Tensor
    """[E] sequence of each edge"""
    part: Tensor
    """[E] number of the first partial result of each edge, whose shares follow"""
    first: Tensor
    """[B + 1] partial results of sequence b are first[b] to first[b + 1]"""

    def to(self, device: torch.device | str) -> Plan:
        return Plan(*(t.to(device) for t in self))


def plan(spec: SharedPrefixSpec, lengths: Sequence[int], paths: Sequence[Sequence[int]]) -> Plan:
    """lengths of segments at their longest, and for each sequence the segments that it sees.

    Raises:
        ValueError: a path names a segment that there is not, or one twice.
    """
    users: list[list[int]] = [[] for _ in lengths]
    for b, path in enumerate(paths):
        if len(set(path)) != len(path) or not all(0 <= s < len(lengths) for s in path):
            raise ValueError(
                f"path {list(path)} of sequence {b} names a segment twice or none of {len(lengths)}"
            )
        for s in path:
            users[s].append(b)
    sizes = [(MANY if len(rows) * spec.group > FEW else FEW) // spec.group for rows in users]
    tiles = [-(-len(rows) // size) for rows, size in zip(users, sizes, strict=True)]
    shares = _shares(spec, lengths, tiles)
    edges = [(s, b) for s, rows in enumerate(users) for b in rows]
    first, base = [0], {}
    for b, path in enumerate(paths):
        for s in path:
            base[s, b] = first[-1] + sum(shares[t] for t in path[: path.index(s)])
        first.append(first[-1] + sum(shares[s] for s in path))
    tasks: dict[int, list[tuple[int, ...]]] = {FEW: [], MANY: []}
    begin = 0
    for s, rows in enumerate(users):
        kind = MANY if len(rows) * spec.group > FEW else FEW
        for at in range(0, len(rows), sizes[s]):
            count = min(sizes[s], len(rows) - at)
            tasks[kind] += [(s, begin + at, count, share, shares[s]) for share in range(shares[s])]
        begin += len(rows)
    # Long shares first, so that the last to end are short.
    few, many = (sorted(tasks[kind], key=lambda t: -lengths[t[0]] // t[4]) for kind in (FEW, MANY))
    return Plan(
        _table(few, 5),
        _table(many, 5),
        _ints([b for _, b in edges]),
        _ints([base[e] for e in edges]),
        _ints(first),
    )


def _shares(spec: SharedPrefixSpec, lengths: Sequence[int], tiles: Sequence[int]) -> list[int]:
    """Programs that share the keys of each segment: as many keys for each as the aim gives, or the least."""
    work = sum(n * t for n, t in zip(lengths, tiles, strict=True)) * spec.kv_heads
    aim = max(spec.least, -(-work // spec.programs))
    return [max(1, -(-n // aim)) for n in lengths]


def _ints(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def _table(rows: list[tuple[int, ...]], width: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32).view(-1, width)
