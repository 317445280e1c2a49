"""Ops of attention whose map of probabilities is kept, so that other layers can use it.

Shapes: B sequences, T tokens, S keys, H heads, Hk key heads of width h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effc.compiler.blocks.attention import attend as _attend
from effc.compiler.blocks.echo_attention import probabilities, weighted
from effc.compiler.op_kind import op as _op
from effc.compiler.step import Step

Seen = tuple[Tensor | None, bool]
"""A mask [B or 1, 1, T, S], or None with a word on whether causal order is all."""


@_op(gives=2)
def attention_map(
    q: Tensor, k: Tensor, seen: Seen, past: Tensor | None = None, *, scale: float, cap: float | None
) -> tuple[Tensor, Tensor]:
    """q [B, H, T, h] over past and new k [B, Hk, T, h] -> probabilities [B, H, T, S] and all keys"""
    k = k if past is None else torch.cat((past, k), 2)
    return probabilities(q, k, seen[0], seen[1], scale, cap), k


@_op(gives=2)
def weigh(map: Tensor, v: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """map [B, H, T, S] over past and new v [B, Hk, T, h] -> y [B, H, T, h] and all values"""
    v = v if past is None else torch.cat((past, v), 2)
    return weighted(map, v), v


@_op(gives=2)
def attend_again(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Seen,
    past: Tensor | None = None,
    *,
    scale: float,
    cap: float | None,
) -> tuple[Tensor, Tensor]:
    """q [B, H, T, h] and all k [B, Hk, S, h] of another layer over past and new v -> y and all values"""
    v = v if past is None else torch.cat((past, v), 2)
    return _attend(q, k, v, seen[0], seen[1], scale, cap), v


@_op()
def heard(step: Step, *, side: str) -> Tensor:
    """What an earlier block told, as it is"""
    return step.sides[side]
