"""Ops on numbers that lie on grids of few codes.

Shapes: B sequences, T tokens, S keys, H heads, Hk key heads of width h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effc.compiler.blocks.coded_attention import Curve, on_curve
from effc.compiler.blocks.coded_linear import on_grid as _on_grid
from effc.compiler.blocks.echo_attention import probabilities, weighted
from effc.compiler.op_kind import op as _op

State = tuple[Tensor, Tensor] | None
"""Keys and values [B, Hk, S, h] of earlier tokens; None before the first."""


@_op()
def on_grid(x: Tensor, scale: Tensor, zero: Tensor, *, bits: int) -> Tensor:
    """x -> scale (clip(round(x / scale) + zero) - zero), codes signed; scale and zero [1]"""
    return _on_grid(x, scale, zero, bits)


@_op(gives=2)
def attend_coded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: tuple[Tensor | None, bool],
    size: Tensor,
    past: State = None,
    *,
    scale: float,
    cap: float | None,
    curve: Curve,
    bits: int,
) -> tuple[Tensor, State]:
    """As `attend`, with probabilities on a curve of 2^bits points below `size` [1]; see coded_attention.py"""
    if past is not None:
        k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
    p = probabilities(q, k, seen[0], seen[1], scale, cap)
    return weighted(on_curve(p, size, curve, bits), v), (k, v)
