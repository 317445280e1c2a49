"""Ops of parallel streams: rows repeated, keys and values that stand before all others, and the weighted sum.

Shapes: B sequences, P streams, stream-major rows P B, T tokens, S keys, n learned pairs, d width, Hk key
heads of width h.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from effc.compiler.op_kind import op as _op
from effc.compiler.step import Step

Past = tuple[Tensor, Tensor] | None
"""Keys and values [P B, Hk, S, h] of earlier tokens, learned ones first; None before the first."""


@_op()
def repeat_rows(x: Tensor, *, count: int) -> Tensor:
    """x [B, ...] -> [P B, ...], stream by stream"""
    return torch.cat((x,) * count)


@_op()
def streamed(step: Step, *, count: int) -> Step:
    """The step of a batch, of each of its rows in every stream"""
    key = ("streams", count)
    if key not in step.memo:
        rows = {
            name: None if (given := getattr(step, name)) is None else repeat_rows(given, count=count)
            for name in ("positions", "segments", "key_mask", "token_types")
        }
        more: dict[str, Any] = dict(rows)
        step.memo[key] = replace(step, **more, memo={})
    found: Step = step.memo[key]
    return found


@_op()
def visible_behind(
    step: Step, x: Tensor, *, length: int, causal: bool, window: int | None
) -> tuple[Tensor | None, bool]:
    """As `visible`, behind `length` keys that everybody sees"""
    mask, ordered = step.mask(x.shape[1], causal, window)
    if not length or (mask is None and not ordered):
        return mask, ordered
    if mask is None:
        mask = torch.ones(1, 1, x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
    return torch.cat((mask.new_ones(*mask.shape[:3], length), mask), 3), False


@_op()
def behind_prefix(k: Tensor, first: Tensor, past: Past = None) -> Tensor:
    """k [P B, Hk, T, h] behind first [P, Hk, n, h]; as it is where a past has those already"""
    if past is not None:
        return k
    return torch.cat((rows_of(first, k.shape[0]), k), 2)


@_op()
def side_by_side(x: Tensor, *, count: int) -> Tensor:
    """x [P B, T, d] -> [B, T, P d]"""
    return _by_token(x, count).flatten(2)


@_op()
def aggregated(x: Tensor, scores: Tensor, *, smoothing: float) -> Tensor:
    """x [P B, T, d], scores [B, T, P] -> [B, T, d], weighed by smoothed softmax, in float32 at least"""
    wide = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    count = scores.shape[-1]
    weights = torch.softmax(wide, -1) * (1 - smoothing) + smoothing / count
    return (_by_token(x, count).to(weights.dtype) * weights.unsqueeze(-1)).sum(2).to(x.dtype)


def _by_token(x: Tensor, count: int) -> Tensor:
    """x [P B, T, d] -> [B, T, P, d]"""
    return x.view(count, -1, *x.shape[1:]).permute(1, 2, 0, 3)


def rows_of(first: Tensor, rows: int) -> Tensor:
    """first [P, Hk, n, h] -> [P B, Hk, n, h] for so many rows"""
    return first.repeat_interleave(rows // first.shape[0], 0)
