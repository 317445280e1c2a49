"""Run the C kernel of cached_attention on torch tensors, through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import cache as remembered
from typing import cast

import torch
from torch import Tensor

from effc.kernels.cached_attention.emit_c import emit
from effc.kernels.cached_attention.layout import Cache
from effc.kernels.cached_attention.spec import CachedAttentionSpec
from effc.kernels.cpu.build import build, load
from effc.kernels.cpu.isa import Isa
from effc.kernels.quant_linear.call import team

_POINTER, _LONG = ctypes.c_void_p, ctypes.c_long


class _Arguments(ctypes.Structure):
    """`struct arguments` of the emitted file, field by field."""

    _fields_ = (
        ("team", _POINTER),
        *((name, _LONG) for name in ("members", "M", "S", "q_stride", "k_stride", "v_stride")),
        *((name, _POINTER) for name in ("q", "k", "v", "slot", "position", "turn")),
        *((name, _POINTER) for name in ("cosines", "sines", "q_gain", "k_gain")),
        *((name, _POINTER) for name in ("keys", "values", "queries", "y")),
    )


@remembered
def compiled(spec: CachedAttentionSpec, isa: Isa) -> Callable[..., None]:
    """The entry of the kernel, compiled for one instruction set."""
    entry = load(build(emit(spec), isa)).cached_attention
    entry.restype = None
    return cast(Callable[..., None], entry)


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
    more = [given[n].data_ptr() if n in given else 0 for n in ("cosines", "sines", "q_gain", "k_gain")]
    arguments = _Arguments(
        team(isa), threads, m, keys, q.stride(0), k.stride(0), v.stride(0), q.data_ptr(), k.data_ptr(),
        v.data_ptr(), slot.data_ptr(), position.data_ptr(), turn.data_ptr(), *more, cache.keys.data_ptr(),
        cache.values.data_ptr(), queries.data_ptr(), y.data_ptr(),
    )  # fmt: skip
    compiled(spec, isa)(ctypes.byref(arguments))
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
