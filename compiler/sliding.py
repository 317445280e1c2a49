"""Sliding-window attention over keys that may lie in a ring, in time and memory linear in the sequence.

Shapes: q [B, H, T, h], k and v [B, Hk, S, h]: S keys, H a multiple of Hk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effc.compiler.blocks.attention import attend
from effc.compiler.step import Step

ROWS = 256
"""Queries that meet their keys in one product, at least."""


def near(
    q: Tensor, k: Tensor, v: Tensor, slots: Tensor, step: Step, window: int, scale: float, cap: float | None
) -> Tensor:
    """Each query sees itself and the window - 1 tokens before it -> [B, H, T, h].

    `slots` [S] says which token of the sequence a key is. Keys of several queries stand in order, the last
    T of them those of the queries; for one query any order will do, and no key lies outside its window.
    """
    length, past = q.shape[2], k.shape[2] - q.shape[2]
    if length == 1:
        mask = None if step.key_mask is None else step.key_mask[:, None, None, slots]
        return attend(q, k, v, mask, False, scale, cap)
    plain = step.key_mask is None and step.segments is None
    if plain and not past and window >= length:
        return attend(q, k, v, None, True, scale, cap)
    rows = max(window, ROWS)
    parts = []
    for start in range(0, length, rows):
        end = min(start + rows, length)
        low, high = max(0, past + start - window + 1), past + end
        key = ("near", window, length, start)
        if key not in step.memo:
            step.memo[key] = _mask(step, slots[low:high], slots[past + start : high], window)
        parts.append(
            attend(
                q[:, :, start:end], k[:, :, low:high], v[:, :, low:high], step.memo[key], False, scale, cap
            )
        )
    return torch.cat(parts, 2)


def _mask(step: Step, keys: Tensor, queries: Tensor, window: int) -> Tensor:
    """[B or 1, 1, T, S] bool; a query that sees nobody, being padding, sees everybody."""
    mine = queries[:, None]
    seen = ((keys <= mine) & (keys > mine - window))[None, None]
    if step.segments is not None:
        first = step.start
        seen = seen & (
            step.segments[:, None, queries - first, None] == step.segments[:, None, None, keys - first]
        )
    if step.key_mask is not None:
        seen = seen & step.key_mask[:, None, None, keys]
        seen = seen | ~seen.any(-1, keepdim=True)
    return seen
