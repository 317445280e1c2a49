"""Ops of recurrent blocks: gates, the scan, attention in a window, and states of several parts.

Shapes: B sequences, T tokens, H heads, Hk key heads, K and V channels of keys and values. A state goes in,
None before the first token, and comes out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effc.compiler import fast_weights as _fast
from effc.compiler import newton as _newton
from effc.compiler import scan as _scan
from effc.compiler.op_kind import op as _op
from effc.compiler.sliding import near as _near
from effc.compiler.step import Step


@_op()
def log_gate(x: Tensor, *, divisor: float) -> Tensor:
    """log sigmoid(x) / divisor, in float32 at least"""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return F.logsigmoid(wide) / divisor


@_op()
def complement(g: Tensor) -> Tensor:
    """1 - exp(g): what a gate lets in"""
    return -torch.expm1(g)


@_op()
def softmax(x: Tensor) -> Tensor:
    """Over channels, in float32 at least; in x's dtype"""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return torch.softmax(wide, -1).to(x.dtype)


@_op()
def pool(x: Tensor, *, to: int) -> Tensor:
    """x [..., K] -> [..., to]: means of neighboring channels"""
    return x if x.shape[-1] == to else x.unflatten(-1, (to, -1)).mean(-1)


@_op()
def kept(x: Tensor, step: Step) -> Tensor:
    """x [B, Hk, T, K], zero where a token is padding, so that it writes nothing"""
    real = step.real(x.shape[2])
    return x if real is None else x.masked_fill(~real[:, None, :, None], 0.0)


@_op()
def forget(g: Tensor, step: Step) -> Tensor:
    """Log gates [B, Hk, T, K]: 0 at padding, which forgets nothing; -inf where a packed document begins"""
    real, fresh = step.real(g.shape[2]), step.fresh()
    if real is not None:
        g = g.masked_fill(~real[:, None, :, None], 0.0)
    return g if fresh is None else g.masked_fill(fresh[:, None, :, None], -torch.inf)


@_op(gives=2)
def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    past: Tensor | None = None,
    *,
    over: _scan.Over,
    scale: float,
    chunk: int,
    sub: int,
) -> tuple[Tensor, Tensor]:
    """q [B, H, T, K] and k, v, g [B, Hk, T, .] -> y [B, H, T, V] and the state [B, Hk, K, V]; see scan.py"""
    return _scan.scan(q, k, v, g, past, over=over, scale=scale, chunk=chunk, sub=sub)


@_op(gives=2)
def near(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: Step,
    past: tuple[Tensor, Tensor] | None = None,
    *,
    window: int,
    scale: float,
    cap: float | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """q [B, H, T, h] over the last `window` of past and new k, v -> y [B, H, T, h] and those that stay in
    reach
    """
    if past is not None:
        k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
    end = step.start + q.shape[2]
    slots = torch.arange(end - k.shape[2], end, device=k.device)
    held = max(0, k.shape[2] - window + 1)  # the next token needs a slot of its own
    if q.shape[2] == 1:
        reach = max(0, k.shape[2] - window)
        y = _near(q, k[:, :, reach:], v[:, :, reach:], slots[reach:], step, window, scale, cap)
    else:
        y = _near(q, k, v, slots, step, window, scale, cap)
    return y, (k[:, :, held:], v[:, :, held:])


@_op(gives=2)
def parts(past: tuple[Any, Any] | None = None) -> tuple[Any, Any]:
    """The two states of a pair; none of none"""
    return (None, None) if past is None else past


@_op()
def both(a: Any, b: Any) -> tuple[Any, Any]:
    """Two states as one"""
    return a, b


@_op()
def repeat(x: Tensor, *, times: int) -> Tensor:
    """x [..., H] -> [..., H times]: each number so often, neighbors"""
    return x.repeat_interleave(times, -1)


@_op()
def times(x: Tensor, w: Tensor) -> Tensor:
    """x [..., d] by a weight [1]"""
    return x * w


@_op()
def half_identity(left: Tensor, right: Tensor) -> Tensor:
    """left [N, o, r], right [N, r, i] -> left right + I / 2 [N, o, i], in float32 at least"""
    a, b = (t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in (left, right))
    return a @ b + torch.eye(a.shape[1], b.shape[2], dtype=a.dtype, device=a.device) / 2


@_op()
def repeat_heads(x: Tensor, *, times: int) -> Tensor:
    """x [B, Hk, T, h] -> [B, Hk times, T, h]: each head so often, neighbors"""
    return x.repeat_interleave(times, 1)


@_op()
def pick(x: Tensor) -> Tensor:
    """x [..., 1] -> [...]"""
    return x[..., 0]


@_op(gives=2)
def learn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    betas: Tensor | None,
    w_in: Tensor,
    w_gate: Tensor,
    w_out: Tensor,
    step: Step,
    past: tuple[Tensor, ...] | None = None,
    *,
    chunk: int,
    rule: _fast.Rule,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """q, k, v [B, N, T, D] through weights that learn from them -> y [B, N, T, D]; see fast_weights.py"""
    return _fast.learn(q, k, v, rates, betas, (w_in, w_gate, w_out), past, step, chunk, rule)


@_op()
def head_linear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """x [..., i], w [H, o / H, i / H], b [o] -> [..., o]: each part of x through a matrix of its own"""
    parts: Tensor = x.unflatten(-1, (w.shape[0], -1)).unsqueeze(-2) @ w.mT
    return parts.squeeze(-2).flatten(-2) + b


@_op(gives=2)
def recur(
    first: Tensor,
    second: Tensor,
    third: Tensor,
    peep: Tensor,
    step: Step,
    past: Tensor | None = None,
    *,
    cell: _newton.Cell,
    jac: _newton.Jac,
    iters: int,
    omega: float,
    tol: float,
) -> tuple[Tensor, Tensor]:
    """Inputs of three gates [B, T, d] and diagonal weights [P, d] -> h [B, T, d] and the state [B, S, d]"""
    wide = [
        t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in (first, second, third, peep)
    ]
    u, a = torch.stack(wide[:3], -2), wide[3]
    start = u.new_zeros(u.shape[0], _newton.STATES[cell], u.shape[-1]) if past is None else past
    real = step.real(u.shape[1])
    keep = None if real is None else ~real
    how = {"jac": jac, "iters": iters, "omega": omega, "tol": tol}
    states = _newton.solve(cell, u, a, start, keep, step.fresh(), **how)
    return states[:, :, -1].to(first.dtype), states[:, -1]


@_op(gives=2)
def first_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, 1 + P, d] -> the first token [B, 1, d], the others [B, P, d]"""
    return x[:, :1], x[:, 1:]


@_op()
def behind(first: Tensor, rest: Tensor) -> Tensor:
    """[B, 1, d] and [B, P, d] -> [B, 1 + P, d]"""
    return torch.cat((first, rest), 1)


@_op()
def depthwise(x: Tensor, w: Tensor, b: Tensor, *, side: int) -> Tensor:
    """x [B, side side, d] as an image, each channel through its own w [d, 1, k, k], zeros around it"""
    image = x.transpose(1, 2).unflatten(2, (side, side))
    y = F.conv2d(image, w, b, padding=w.shape[-1] // 2, groups=w.shape[0])
    return y.flatten(2).transpose(1, 2)


@_op()
def backwards(x: Tensor) -> Tensor:
    """x [B, H, T, K], the last token first"""
    return x.flip(2)


@_op(gives=2)
def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, 2 H, T, K] -> the first H heads, the last"""
    a, b = x.chunk(2, 1)
    return a, b
