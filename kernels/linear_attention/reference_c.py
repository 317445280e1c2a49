"""The definition of RecurrentSpec in plain torch, row after row, at the precision of what it is given.

The recurrence itself is that of `reference`; here its rows are made, and states are kept by sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effc.kernels.linear_attention.spec_c import RecurrentSpec


class Prepared(NamedTuple):
    """What the recurrence takes of M rows."""

    queries: Tensor
    """[M, H, K], scaled"""
    keys: Tensor
    """[M, Hk, K]"""
    values: Tensor
    """[M, Hk, V]"""
    decay: Tensor
    """[M, Hk, gates]"""


def prepare(
    spec: RecurrentSpec, q: Tensor, k: Tensor, v: Tensor, x: Tensor, gains: tuple[Tensor, Tensor] | None
) -> Prepared:
    """q [M, H K], k [M, Hk K], v [M, Hk V], x [M, Hk gates pool]; k and v are not read where 1 - a stands."""
    queries = q.view(-1, spec.heads, spec.key_dim)
    opened = F.logsigmoid(x.view(-1, spec.kv_heads, spec.gates, spec.pool).mean(-1)) / spec.divisor
    entry = -torch.expm1(opened)
    keys = entry if spec.k == "entry" else k.view(-1, spec.kv_heads, spec.key_dim)
    if gains is not None:
        queries = _normed(spec, queries, gains[0])
        keys = keys if spec.k == "entry" else _normed(spec, keys, gains[1])
    queries = queries.softmax(-1) if spec.q == "softmax" else queries
    keys = keys.softmax(-1) if spec.k == "softmax" else keys
    values = entry if spec.v == "entry" else v.view(-1, spec.kv_heads, spec.value_dim)
    return Prepared(queries * spec.scale, keys, values, opened.exp())


def recur(spec: RecurrentSpec, rows: Prepared, slot: Tensor, position: Tensor, states: Tensor) -> Tensor:
    """states [slots, Hk, K, V], which change in place -> o [M, H V]."""
    outputs = []
    for m, (sequence, at) in enumerate(zip(slot.tolist(), position.tolist(), strict=True)):
        if at == 0:
            states[sequence] = 0
        gate = rows.decay[m].unsqueeze(-1 if spec.over == "key" else -2)
        entry = rows.keys[m].unsqueeze(-1) * rows.values[m].unsqueeze(-2)
        states[sequence] = states[sequence] * gate + entry
        query = rows.queries[m].view(spec.kv_heads, spec.group, spec.key_dim)
        outputs.append((query @ states[sequence]).flatten())
    return torch.stack(outputs)


def blocked(spec: RecurrentSpec, states: Tensor) -> Tensor:
    """states [slots, Hk, K, V] as the kernel keeps them: [slots, Hk, blocks, K, 16], filled with zeros."""
    wide = F.pad(states, (0, spec.blocks * 16 - spec.value_dim))
    parts: Tensor = wide.unflatten(-1, (spec.blocks, 16))
    return parts.transpose(-2, -3).contiguous()


def _normed(spec: RecurrentSpec, x: Tensor, gain: Tensor) -> Tensor:
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + spec.norm)
    return x * (gain.to(x.dtype) + spec.norm_offset)
