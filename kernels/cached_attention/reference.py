"""The definition in plain torch, one token after the other, at the precision of what it is given.

Shapes: q [M, H h], k and v [M, Hk h], slot, position and turn [M]; keys and values [slots, Hk, S, h];
cosines and sines [T, r / 2]. The blocks attention, rope and norm define the same on whole batches.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from effc.kernels.cached_attention.spec import CachedAttentionSpec


def write(
    spec: CachedAttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot: Tensor,
    position: Tensor,
    keys: Tensor,
    values: Tensor,
    given: Mapping[str, Tensor],
) -> Tensor:
    """Put k and v into the cache in place -> queries [M, H, h], turned and scaled.

    `given` holds cosines and sines where dimensions turn, q_gain and k_gain [h] where heads are normed, and
    may hold turn [M], the row of the tables for each token; it is the position otherwise.
    """
    turn = given.get("turn", position)
    queries = _turned(spec, q.view(-1, spec.heads, spec.head_dim), "q_gain", turn, given)
    fresh = _turned(spec, k.view(-1, spec.kv_heads, spec.head_dim), "k_gain", turn, given)
    room = keys.shape[2]
    for m, (sequence, at) in enumerate(zip(slot.tolist(), position.tolist(), strict=True)):
        place = at % room if spec.ring else at
        keys[sequence, :, place] = _cell(spec, fresh[m])
        values[sequence, :, place] = _cell(spec, v[m].view(spec.kv_heads, spec.head_dim))
    return queries * spec.scale


def attend(
    spec: CachedAttentionSpec, queries: Tensor, slot: Tensor, position: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """queries [M, H, h] as `write` returns them -> y [M, H h]; all keys of the call are in the cache."""
    rows = []
    for m, (sequence, at) in enumerate(zip(slot.tolist(), position.tolist(), strict=True)):
        first = 0 if spec.window is None else max(0, at - spec.window + 1)
        seen = torch.arange(first, at + 1)
        if spec.ring:
            seen %= keys.shape[2]
        k, v = (t[sequence][:, seen].repeat_interleave(spec.group, 0) for t in (keys, values))
        scores = torch.einsum("hd,hsd->hs", queries[m], k)
        if spec.cap is not None:
            scores = (scores / spec.cap).tanh() * spec.cap
        rows.append(torch.einsum("hs,hsd->hd", scores.softmax(-1), v).flatten())
    return torch.stack(rows)


def _turned(
    spec: CachedAttentionSpec, x: Tensor, gain: str, turn: Tensor, given: Mapping[str, Tensor]
) -> Tensor:
    """x [M, *, h] normed over h, then the first r dimensions turned: (a, b) -> (a c - b s, b c + a s)."""
    if spec.norm:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + spec.norm)
        x = x * (given[gain].to(x.dtype) + spec.norm_offset)
    if not spec.rotated:
        return x
    c, s = (given[name].to(x.dtype)[turn].unsqueeze(1) for name in ("cosines", "sines"))
    a, b = x[..., : spec.rotated].chunk(2, -1)
    return torch.cat((a * c - b * s, b * c + a * s, x[..., spec.rotated :]), -1)


def _cell(spec: CachedAttentionSpec, x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype) if spec.cell == "bfloat16" else x
