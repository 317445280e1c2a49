"""Streams: one input through the same weights P times at once, told apart by learned keys and values.

Shapes: B sequences, P streams, stream-major rows P B, T tokens, d width, H heads and Hk key heads of width h,
n learned pairs. Source: Parallel Scaling Law for Language Models, arXiv 2505.10475, section 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from effc.compiler.blocks.attention import Attention, AttentionForm, attend
from effc.compiler.blocks.linear import Linear
from effc.compiler.blocks.rope import rotate, tables
from effc.compiler.blocks.unit import DTYPES, Unit, empty
from effc.compiler.ops_streams import (
    aggregated,
    behind_prefix,
    repeat_rows,
    side_by_side,
    streamed,
    visible_behind,
)
from effc.compiler.step import Step

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value


class Streams(Unit):
    """x [B, T, d] -> [P B, T, d]: every row once in each of P = `streams` streams."""

    def __init__(self, *, streams: int) -> None:
        super().__init__()
        if streams < 2:
            raise ValueError(f"{streams} streams are none to be parallel")
        self.streams = streams

    def expand(self, ops: Ops, x: Value) -> Value:
        return ops("repeat_rows", x, count=self.streams)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = repeat_rows(x, count=self.streams)
        return out


class Prefix(Unit):
    """Learned keys and values k, v [P, Hk, n, h] that every token of a stream sees, at no position."""

    k: nn.Parameter
    v: nn.Parameter

    def __init__(
        self, *, streams: int, kv_heads: int, length: int, head_dim: int, dtype: str = "float32"
    ) -> None:
        super().__init__()
        self.streams = streams
        self.kv_heads = kv_heads
        self.length = length
        self.head_dim = head_dim
        self.dtype = dtype
        self.k = empty(streams, kv_heads, length, head_dim, dtype=dtype)
        self.v = empty(streams, kv_heads, length, head_dim, dtype=dtype)


class PrefixAttention(Attention):
    """Attention of P streams, each behind `prefix` learned keys and values of its own.

    What a token costs is said for one stream; `compiler/cost.py` takes it P times.
    """

    def __init__(
        self,
        *,
        streams: int,
        prefix_length: int,
        **form: Unpack[AttentionForm],
    ) -> None:
        super().__init__(**form)
        self.streams = streams
        self.prefix_length = prefix_length
        if prefix_length:
            self.prefix = Prefix(
                streams=streams,
                kv_heads=self.kv_heads,
                length=prefix_length,
                head_dim=self.head_dim,
                dtype=self.dtype,
            )

    def flops(self, mean: int) -> int:
        return super().flops(mean) + 4 * self.prefix_length * self.heads * self.head_dim

    def state_bytes(self) -> int:
        size: int = DTYPES[self.dtype].itemsize
        return 2 * self.kv_heads * self.prefix_length * self.head_dim * size if self.causal else 0

    def expand_mixed(self, ops: Ops, x: Value) -> Value:
        q = ops("heads", ops.inline("q", self.q, x), count=self.heads)
        k = ops("heads", ops.inline("k", self.k, x), count=self.kv_heads)
        v = ops("heads", ops.inline("v", self.v, x), count=self.kv_heads)
        if self.qk_norm:
            q, k = ops.inline("q_norm", self.q_norm, q), ops.inline("k_norm", self.k_norm, k)
        q, k, v = ops("heads_first", q), ops("heads_first", k), ops("heads_first", v)
        step = ops("streamed", ops.step, count=self.streams)
        if self.rope is not None:
            q, k = (ops("rope", t, step, parameters=self.rope) for t in (q, k))
        settings = {"length": self.prefix_length, "causal": self.causal, "window": self.window}
        seen = ops("visible_behind", step, x, **settings)
        if self.prefix_length:
            k = ops("behind_prefix", k, ops.weight("prefix.k"), ops.past)
            v = ops("behind_prefix", v, ops.weight("prefix.v"), ops.past)
        y, state = ops.many("attend", q, k, v, seen, ops.past, scale=self.factor, cap=self.cap)
        ops.graph.state = state.number
        return ops("join_heads", y)

    def mixed(self, x: Tensor, step: Step) -> Tensor:
        """x [P B, T, d] -> [P B, T, H h], before W_o."""
        inner: Step = streamed(step, count=self.streams)
        q, k, v = (self._of(linear, x) for linear in (self.q, self.k, self.v))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.rope is not None:
            cos, sin = tables(self.rope, self.head_dim, inner, x.dtype)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mask, ordered = visible_behind(
            inner, x, length=self.prefix_length, causal=self.causal, window=self.window
        )
        first = (self.prefix.k, self.prefix.v) if self.prefix_length else None
        if step.cache is not None:
            k, v = step.cache.extend(self, k, v, first=first)
        elif first is not None:
            k, v = behind_prefix(k, first[0]), behind_prefix(v, first[1])
        y = attend(q, k, v, mask, ordered, self.factor, self.cap)
        return y.transpose(1, 2).flatten(2)

    def _of(self, linear: Linear, x: Tensor) -> Tensor:
        y: Tensor = linear(x)
        return y.view(*x.shape[:2], -1, self.head_dim)


class Aggregate(Unit):
    """y = sum_p w_p x_p, w = softmax(W_s silu(W_m [x_1 .. x_P])) (1 - eps) + eps / P, for each token.

    x [P B, T, d] -> [B, T, d]; W_m [d, P d], W_s [P, d]; eps = `smoothing`.
    """

    def __init__(self, *, width: int, streams: int, smoothing: float = 0.01, dtype: str = "float32") -> None:
        super().__init__()
        self.width = width
        self.streams = streams
        self.smoothing = smoothing
        self.dtype = dtype
        self.mix = Linear(in_features=streams * width, out_features=width, dtype=dtype)
        self.score = Linear(in_features=width, out_features=streams, dtype=dtype)

    def expand(self, ops: Ops, x: Value) -> Value:
        side = ops("side_by_side", x, count=self.streams)
        inner = ops("activate", ops.inline("mix", self.mix, side), form="silu")
        scores = ops.inline("score", self.score, inner)
        return ops("aggregated", x, scores, smoothing=self.smoothing)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.score(F.silu(self.mix(side_by_side(x, count=self.streams))))
        out: Tensor = aggregated(x, scores, smoothing=self.smoothing)
        return out
