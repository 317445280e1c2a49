"""Skipping: blocks that run for the tokens that go as deep as they lie, and cost the others nothing.

Shapes: B sequences, T tokens, d width, N tokens that run. Of the others the block gives zero, so the
stream behind a residual addition stays as it was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor

from effc.compiler.blocks.attention import Attention, AttentionForm, attend
from effc.compiler.blocks.linear import Linear
from effc.compiler.blocks.mlp import MLP, Activation
from effc.compiler.blocks.rope import rotate, tables
from effc.compiler.blocks.unit import DTYPES, Unit
from effc.compiler.ops_adaptive import hold, running
from effc.compiler.step import Step

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value


def expected(reach: int | None, horizon: int) -> float:
    """The share of the first `horizon` positions at which a block runs that stops after `reach` of them."""
    return 1.0 if reach is None else min(reach, horizon) / horizon


def saved(unit: Unit, own: int, reach: int | None, horizon: int, mean: int) -> int:
    """FLOPs per token that a block saves on the mean of `horizon` positions, its children's among them."""
    inner = sum(u.flops(mean) for u in unit.modules() if isinstance(u, Unit) and u is not unit)
    return round((1 - expected(reach, horizon)) * (own + inner))


class SkipAttention(Attention):
    """Attention for the tokens whose depth is `least` or more.

    `fill`: the others give keys and values all the same, of the stream as it is, for tokens that come and go
    deeper. Without it they give none: then a token may only run where all tokens before it did. `reach`: how
    many positions run at most (none: any number), of the first `horizon`; the cache holds no more.
    """

    def __init__(
        self,
        *,
        least: int = 1,
        fill: bool = True,
        reach: int | None = None,
        horizon: int = 1,
        **form: Unpack[AttentionForm],
    ) -> None:
        super().__init__(**form)
        if not self.causal:
            raise ValueError("who sees what comes cannot leave it out")
        self.least = least
        self.fill = fill
        self.reach = reach
        self.horizon = horizon

    def flops(self, mean: int) -> int:
        own = super().flops(mean)
        return own - saved(self, own, self.reach, self.horizon, mean)

    def kv_bytes(self) -> int:
        return super().kv_bytes() if self.reach is None else 0

    def state_bytes(self) -> int:
        return 0 if self.reach is None else self.reach * self._token_bytes()

    def cache_bytes(self, tokens: int) -> int:
        return (tokens if self.reach is None else min(tokens, self.reach)) * self._token_bytes()

    def _token_bytes(self) -> int:
        size: int = DTYPES[self.dtype].itemsize
        return 2 * self.kv_heads * self.head_dim * size

    def expand(self, ops: Ops, x: Value) -> Value:
        y = super().expand(ops, x)
        return ops("hold", y, ops("running", ops.step, x, least=self.least))

    def forward(self, x: Tensor, step: Step) -> Tensor:
        if x.is_meta or self.training:
            whole: Tensor = hold(super().forward(x, step), running(step, x, least=self.least))
            return whole
        runs = running(step, x, least=self.least)
        if bool(runs.all()):
            if self.fill or self.reach is None:
                return super().forward(x, step)
        elif not self.fill and not bool(runs.any()):
            return torch.zeros_like(x)
        return self.partly(x, step, runs)

    def partly(self, x: Tensor, step: Step, runs: Tensor) -> Tensor:
        """x [B, T, d] -> [B, T, d]: queries of the tokens that run [B, T] alone."""
        out = torch.zeros_like(x)
        length = x.shape[1] if self.fill else int(runs.any(0).nonzero()[-1]) + 1
        rows = runs.any(1).nonzero()[:, 0]
        near, live = x[:, :length], runs[rows, :length]
        turn = tables(self.rope, self.head_dim, step, x.dtype) if self.rope is not None else None
        k, v = self._of(self.k, near), self._of(self.v, near)
        k = self.k_norm(k) if self.qk_norm else k
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if turn is not None:
            k = rotate(k, *(t[..., :length, :] for t in turn))
        if step.cache is not None:
            k, v = step.cache.extend(self, k, v, self._slots(step, x.shape[1]))
        if not len(rows):
            return out
        q = x.new_zeros(*live.shape, self.heads * self.head_dim)
        q[live] = self.q(near[rows][live])
        q = q.view(*live.shape, -1, self.head_dim)
        q = (self.q_norm(q) if self.qk_norm else q).transpose(1, 2)
        if turn is not None:
            q = rotate(q, *((t[rows] if t.shape[0] > 1 else t)[..., :length, :] for t in turn))
        mask, ordered = step.mask(x.shape[1], self.causal, self.window)
        if mask is not None:
            mask = (mask[rows] if mask.shape[0] > 1 else mask)[..., :length, : k.shape[2]]
        y = attend(q, k[rows], v[rows], mask, ordered and length > 1, self.factor, self.cap)
        mixed = self.o(y.transpose(1, 2).flatten(2)[live])
        places = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        places[rows, :length] = live
        out[places] = mixed
        return out

    def _of(self, linear: Linear, x: Tensor) -> Tensor:
        """x [B, T, d] -> [B, T, H, h]"""
        y: Tensor = linear(x)
        return y.view(*x.shape[:2], -1, self.head_dim)

    def _slots(self, step: Step, length: int) -> int | None:
        """Slots that this block ever writes: its reach behind the longest padding, or a prompt that is
        longer; None: as many as the cache has.
        """
        if self.reach is None or step.cache is None:
            return None
        padding = step.start + length - 1 - int(step.positions[:, -1].min())
        return min(step.cache.length, max(length if step.phase == "prefill" else 0, self.reach + padding))


class SkipMLP(MLP):
    """A feed-forward block for the tokens whose depth is `least` or more; `reach`, `horizon`: as above."""

    takes_step = True

    def __init__(
        self,
        *,
        width: int,
        hidden: int,
        least: int = 1,
        reach: int | None = None,
        horizon: int = 1,
        activation: Activation = "silu",
        gated: bool = True,
        bias: bool = False,
        dtype: str = "float32",
    ) -> None:
        super().__init__(
            width=width, hidden=hidden, activation=activation, gated=gated, bias=bias, dtype=dtype
        )
        self.least = least
        self.reach = reach
        self.horizon = horizon

    def flops(self, mean: int) -> int:
        return -saved(self, 0, self.reach, self.horizon, mean)

    def expand(self, ops: Ops, x: Value) -> Value:
        return ops("hold", super().expand(ops, x), ops("running", ops.step, x, least=self.least))

    def forward(self, x: Tensor, step: Step) -> Tensor:  # type: ignore[override]
        runs = running(step, x, least=self.least)
        if x.is_meta or self.training:
            whole: Tensor = hold(super().forward(x), runs)
            return whole
        return of_some(super().forward, x, runs)


class SkipHead(Linear):
    """The head, of the tokens that have not left before: zero for the others, whose answers are known."""

    takes_step = True

    def expand(self, ops: Ops, x: Value) -> Value:
        return ops("hold", super().expand(ops, x), ops("running", ops.step, x, least=1))

    def forward(self, x: Tensor, step: Step) -> Tensor:  # type: ignore[override]
        runs = running(step, x, least=1)
        if x.is_meta or self.training:
            whole: Tensor = hold(super().forward(x), runs)
            return whole
        return of_some(super().forward, x, runs)


def of_some(function: Any, x: Tensor, runs: Tensor) -> Tensor:
    """function(x) [B, T, o] of the tokens that run [B, T], zero elsewhere; the others are not computed."""
    if bool(runs.all()):
        whole: Tensor = function(x)
        return whole
    y: Tensor = function(x[runs])
    out = y.new_zeros(*x.shape[:2], y.shape[-1])
    out[runs] = y
    return out
