"""Ops of loops that some tokens run.

Shapes: x [B, T, d] outside of a loop; inside [1, N, d], the tokens that run it, row by row.
"""

from __future__ import annotations

from torch import Tensor

from effc.compiler.blocks.recursion import Act, entered, left
from effc.compiler.op_kind import op as _op
from effc.compiler.step import Step
from effc.compiler.tokens import Among, Past, Router


@_op()
def enter(
    x: Tensor,
    logits: Tensor | None,
    guess: Tensor | None,
    bias: Tensor | None,
    step: Step,
    *,
    loop: int,
    route: Router,
    share: float,
) -> Tensor:
    """x [B, T, d] -> [1, N, d]: the tokens that run; see recursion.py"""
    return entered(x, logits, guess, bias, step, loop, route, share)


@_op()
def leave(x: Tensor, step: Step, *, loop: int, loops: int, route: Router, act: Act, alpha: float) -> Tensor:
    """x [1, N, d] -> [B, T, d]: back among those that did not run"""
    return left(x, step, loop, loops, route, act, alpha)


@_op(gives=2)
def attend_among(
    q: Tensor, k: Tensor | None, v: Tensor | None, step: Step, past: Past | None = None, *, how: Among
) -> tuple[Tensor, Past | None]:
    """q [1, N, H, h], k and v [1, N, Hk, h] -> y [1, N, H h] and the longer past; see tokens.py"""
    given = None if past is None else tuple(t.clone() for t in past)
    y, after = how.run(q[0], None if k is None else k[0], None if v is None else v[0], step, given)
    return y.flatten(1).unsqueeze(0), after
