"""cached_attention in C, as the checks of kernels/cpu/check.py see it: its cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from effc.kernels.cached_attention.emit_c import emit
from effc.kernels.cached_attention.layout import Cache, empty, plain
from effc.kernels.cached_attention.reference import attend, write
from effc.kernels.cached_attention.spec import CachedAttentionSpec
from effc.kernels.cpu.case import Argument, Case, Inside

__all__ = ["cases", "emit", "parse"]


def parse(data: Mapping[str, Any]) -> CachedAttentionSpec:
    return CachedAttentionSpec.model_validate(data)


def cases(spec: CachedAttentionSpec) -> Iterator[Case]:
    """Calls on one growing cache: unequal prompts, a token beside a few more; once round a ring."""
    dice, room = torch.Generator().manual_seed(0), 128 + spec.ring
    cache = empty(spec, 2, spec.keys(room))
    for part in cache:
        part.fill_(float("nan"))  # what is not written must not be read
    keys, values = (t.double().contiguous() for t in plain(spec, cache))
    h, pairs = spec.head_dim, spec.rotated // 2
    angles = torch.randn(room, max(1, pairs), generator=dice) * 3
    given = {"cosines": angles.cos(), "sines": angles.sin()} if pairs else {}
    if spec.norm:
        given |= {name: torch.randn(h, generator=dice) for name in ("q_gain", "k_gain")}
    first = spec.ring or 70
    plans = [[(0, 0, first), (1, 0, 5)], [(1, 5, 6), (0, first, first + 18)]]
    if spec.ring:
        plans += [[(0, at, at + spec.ring)] for at in range(first + 18, room - spec.ring, spec.ring)]
    for plan in plans:
        slot = torch.tensor([s for s, a, b in plan for _ in range(a, b)])
        position = torch.tensor([p for _, a, b in plan for p in range(a, b)])
        m, sizes = len(slot), [spec.heads * h, spec.kv_heads * h, spec.kv_heads * h]
        fused = torch.randn(m, sum(sizes), generator=dice)
        pointers: dict[str, Argument] = {"q": fused, "k": Inside("q", sizes[0])}
        pointers |= {"v": Inside("q", sizes[0] + sizes[1]), "slot": slot, "position": position}
        pointers |= {"turn": position}
        pointers |= {name: given.get(name) for name in ("cosines", "sines", "q_gain", "k_gain")}
        pointers |= {"keys": cache.keys, "values": cache.values}
        pointers |= {"queries": torch.empty(m, sizes[0]), "y": torch.empty(m, sizes[0])}
        numbers = dict.fromkeys(("q_stride", "k_stride", "v_stride"), sum(sizes))
        q, k, v = (t.double() for t in fused.split(sizes, 1))
        queries = write(spec, q, k, v, slot, position, keys, values, given)
        y = attend(spec, queries, slot, position, keys, values)
        # a key just between two bfloat16 may be rounded the other way
        off = 2e-3 if spec.cell == "bfloat16" else 3e-6
        numbers |= {"M": m, "S": cache.values.shape[2]}
        yield Case(f"{m} rows", pointers | numbers, {"y": y}, off, ("queries",))
        cache = _filled(spec, cache, keys, values)


def _filled(spec: CachedAttentionSpec, cache: Cache, keys: torch.Tensor, values: torch.Tensor) -> Cache:
    """The cache as the first call leaves it: keys and values [slots, Hk, S, h] in its layout."""
    kind, (slots, heads, room, h) = cache.keys.dtype, keys.shape
    wide = torch.zeros(slots, heads, room, spec.padded, dtype=kind)
    wide[..., :h] = values.to(kind)
    blocks = keys.to(kind).view(slots, heads, room // 16, 16, h).transpose(-1, -2).contiguous()
    return Cache(blocks, wide)
