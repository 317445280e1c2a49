"""shared_prefix on a GPU, as the checks of kernels/gpu/check.py see it: its cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from effc.kernels.gpu.check import Case
from effc.kernels.shared_prefix.emit_triton import emit
from effc.kernels.shared_prefix.plan import plan
from effc.kernels.shared_prefix.reference import reference
from effc.kernels.shared_prefix.spec import SharedPrefixSpec

__all__ = ["cases", "emit", "launches", "parse"]

OFF = 4e-3
"""of the largest result: weights are rounded to bfloat16"""
GAP = 3
"""Keys between segments that no sequence sees; they hold NaN."""


def parse(data: Mapping[str, Any]) -> SharedPrefixSpec:
    return SharedPrefixSpec.model_validate(data)


def cases(spec: SharedPrefixSpec) -> Iterator[Case]:
    """A tree of three levels with empty and ragged segments; a long path; many behind one prefix."""
    paths = [(0, 1, 3), (0, 1, 4), (0, 2, 5), (0, 2, 6), (0, 1), ()]
    yield _case(spec, (2 * spec.keys + 7, 33, 0, 1, spec.keys + 2, 0, spec.keys), paths, seed=0)
    yield _case(spec, (5, *([2] * 17)), [range(18)], seed=1)
    yield _case(spec, (2 * spec.keys + 7, 0), [(0,)] * 39 + [(1,), ()], seed=2)


def launches(spec: SharedPrefixSpec) -> Iterator[Case]:
    yield _case(spec, (512, *([64] * 32)), [(0, 1 + b) for b in range(32)], seed=0)


def _case(spec: SharedPrefixSpec, lengths: Sequence[int], paths: Sequence[Sequence[int]], seed: int) -> Case:
    dice = torch.Generator().manual_seed(seed)
    size = torch.tensor(lengths)
    begin = (size + GAP).cumsum(0) - size
    end = begin + size
    shape = (int(end[-1]) + GAP, spec.kv_heads, spec.head_dim)
    k, v = (torch.full(shape, torch.nan).bfloat16() for _ in range(2))
    for low, high in zip(begin.tolist(), end.tolist(), strict=True):
        for t in (k, v):
            t[low:high] = torch.randn(high - low, *shape[1:], generator=dice).bfloat16()
    q = 3 * torch.randn(len(paths), spec.heads, spec.head_dim, generator=dice)
    q = q.bfloat16()
    made = plan(spec, lengths, paths)
    given: dict[str, Any] = {"q": q, "k": k, "v": v, "begin": begin.int(), "end": end.int()}
    given |= {**made._asdict(), "parts": int(made.first[-1])}

    def due() -> dict[str, Tensor]:
        wide = [t.double() for t in (q, k, v)]
        return {"out": reference(wide[0], wide[1], wide[2], begin, end, paths, spec.scale, spec.cap)}

    return Case(f"{len(paths)} sequences over {list(lengths)[:8]}", given, due, OFF)
