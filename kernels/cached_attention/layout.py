"""The cache as the C kernel reads it, and the same keys and values in plain order.

Keys [slots, Hk, S / 16, h, 16]: 16 keys lie side by side, so that 16 scores are sums of one number of q times
a vector. Values [slots, Hk, S, h'], h' = h rounded up to 16: sums of one weight times vectors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from effc.kernels.cached_attention.spec import KEYS, CachedAttentionSpec
from effc.kernels.cpu.pages import room

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Cache(NamedTuple):
    """Keys and values of `slots` sequences with room for S keys each."""

    keys: Tensor
    """[slots, Hk, S / 16, h, 16]"""
    values: Tensor
    """[slots, Hk, S, h']"""


def empty(spec: CachedAttentionSpec, slots: int, keys: int) -> Cache:
    """Room for `keys` keys, a multiple of 64, in each of `slots` sequences; what it holds is never read.

    Raises:
        ValueError: `keys` is not a multiple of 64.
    """
    if keys % KEYS:
        raise ValueError(f"a cache of {keys} keys; the spec rounds up to a multiple of {KEYS}")
    dtype, head = _DTYPES[spec.cell], (slots, spec.kv_heads)
    whole = room(spec.bytes(slots, keys)).view(dtype)
    both = whole.split([slots * spec.kv_heads * keys * width for width in (spec.head_dim, spec.padded)])
    return Cache(both[0].view(*head, keys // 16, spec.head_dim, 16), both[1].view(*head, keys, spec.padded))


def plain(spec: CachedAttentionSpec, cache: Cache) -> tuple[Tensor, Tensor]:
    """Keys and values [slots, Hk, S, h] of the cache's own type."""
    keys = cache.keys.transpose(-1, -2).flatten(2, 3)
    return keys, cache.values[..., : spec.head_dim]
