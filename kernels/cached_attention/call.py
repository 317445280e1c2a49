"""Run the C kernel of cached_attention on torch tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from effc.kernels.cached_attention.emit_c import emit
from effc.kernels.cached_attention.layout import Cache
from effc.kernels.cached_attention.spec import CachedAttentionSpec
from effc.kernels.cpu.entry import launch
from effc.kernels.cpu.isa import Isa


def cached_attention(
    spec: CachedAttentionSpec,
    isa: Isa,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot: Tensor,
    position: Tensor,
    cache: Cache,
    given: Mapping[str, Tensor],
    threads: int,
) -> Tensor:
    """q [M, H h], k and v [M, Hk h] float32, rows at any stride -> y [M, H h]; the cache takes k and v.

    slot and position [M] int64; `given` as in reference.py, float32 (turn int64) contiguous.

    Raises:
        ValueError: a row lies outside the cache or a table, or a call brings more tokens than a ring allows.
    """
    m, keys = q.shape[0], cache.values.shape[2]
    turn = given.get("turn", position)
    _inside(spec, slot, position, turn, cache, given)
    y = torch.empty(m, spec.heads * spec.head_dim)
    queries = torch.empty_like(y)
    rows, more = (q, k, v), (given.get(name) for name in ("cosines", "sines", "q_gain", "k_gain"))
    launch(
        emit(spec), spec.op, isa, threads, *(t.data_ptr() for t in rows), slot, position, turn, *more,
        *cache, queries, y, *(t.stride(0) for t in rows), m, keys,
    )  # fmt: skip
    return y


def _inside(
    spec: CachedAttentionSpec,
    slot: Tensor,
    position: Tensor,
    turn: Tensor,
    cache: Cache,
    given: Mapping[str, Tensor],
) -> None:
    slots, _, keys, _ = cache.values.shape
    if int(slot.min()) < 0 or int(slot.max()) >= slots:
        raise ValueError(f"a slot is outside the cache's {slots}")
    if int(position.min()) < 0:
        raise ValueError("a position is below 0")
    if spec.rotated and not 0 <= int(turn.min()) <= int(turn.max()) < given["cosines"].shape[0]:
        raise ValueError(f"a row's angle is outside the tables of {given['cosines'].shape[0]} rows")
    if int(position.max()) >= keys:
        most = int(slot.bincount().max())
        if not spec.ring:
            raise ValueError(f"position {int(position.max())} is outside a cache of {keys} keys")
        if most > spec.ring or keys < spec.keys(int(position.max()) + 1):
            raise ValueError(f"{most} tokens of one sequence do not fit a ring of {keys} keys")
