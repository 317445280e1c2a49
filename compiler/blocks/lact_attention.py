"""LactAttention: attention over a sliding window, beside a network that learns from the sequence as it
passes.

Shapes: x [B, T, d], q [B, T, H h], k, v [B, T, Hk h]; fast weights of N heads of D = H h / N channels, F
hidden.
Source: Test-Time Training Done Right, arXiv 2505.23884, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from effc.compiler.blocks.attention import Attention
from effc.compiler.blocks.fast_weight import Affine, FastWeight
from effc.compiler.blocks.linear import Linear
from effc.compiler.blocks.norm import Norm
from effc.compiler.blocks.rope import rotate, tables
from effc.compiler.blocks.unit import DTYPES
from effc.compiler.fast_weights import Rule, learn
from effc.compiler.sliding import near
from effc.compiler.step import Step

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value


class LactAttention(Attention):
    """y = W_o (window attention(q, k, v) + s * norm(f_W(q'))), f_W(x) = W_out (silu(W_gate x) * W_in x).

    q' and k' are silu(affine(q)) and silu(affine(k)) of length one in each head, v' = silu(v); s = silu(W_s
    x), one number a head. Behind each chunk of tokens but the last, W moves as compiler/fast_weights.py
    says, by rates softplus(W_r x + c), with c so that they begin near `lr0`.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        window: int,
        chunk: int,
        fast_heads: int,
        inner: float = 1.0,
        low_rank: int = 0,
        rule: Rule = "muon",
        lr0: float = 1e-3,
        bias: bool = False,
        bias_o: bool = False,
        rope: Mapping[str, Any] | None = None,
        qk_norm: float = 0.0,
        cap: float | None = None,
        scale: float | None = None,
        dtype: str = "float32",
    ) -> None:
        super().__init__(
            width=width,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            bias=bias,
            bias_o=bias_o,
            rope=rope,
            qk_norm=qk_norm,
            window=window,
            cap=cap,
            scale=scale,
            dtype=dtype,
        )
        whole = heads * head_dim
        if not fast_heads or whole % fast_heads:
            raise ValueError(f"{whole} channels do not divide over {fast_heads} fast heads")
        if not 0 < chunk <= window:
            raise ValueError(f"a window of {window} does not cover chunks of {chunk}: tokens fall between")
        if not lr0 > 0:
            raise ValueError(f"lr0 must be above 0, not {lr0}")
        self.chunk = chunk
        self.fast_heads = fast_heads
        self.inner = inner
        self.low_rank = low_rank
        self.rule: Rule = rule
        self.lr0 = lr0
        part = whole // fast_heads
        hidden = max(1, int(part * inner))
        if rule == "muon" and min(part, hidden) < 2:
            raise ValueError(f"muon has nothing to turn in matrices of [{hidden}, {part}]")
        self.fast_in = FastWeight(heads=fast_heads, rows=hidden, columns=part, rank=low_rank, dtype=dtype)
        self.fast_gate = FastWeight(heads=fast_heads, rows=hidden, columns=part, rank=low_rank, dtype=dtype)
        self.fast_out = FastWeight(heads=fast_heads, rows=part, columns=hidden, dtype=dtype)
        self.q_affine = Affine(width=whole, dtype=dtype)
        self.k_affine = Affine(width=whole, dtype=dtype)
        self.rate = Linear(in_features=width, out_features=3 * fast_heads, bias=True, dtype=dtype)
        if rule != "sgd":
            self.momentum = Linear(in_features=width, out_features=fast_heads, bias=True, dtype=dtype)
        self.gate = Linear(in_features=width, out_features=fast_heads, dtype=dtype)
        self.norm = Norm(width=part, eps=1e-5, dtype=dtype)

    @property
    def first_bias(self) -> float:
        """c: softplus(c) = lr0"""
        return self.lr0 + math.log(-math.expm1(-self.lr0))

    def flops(self, mean: int) -> int:
        """Of the window, and of a fast network: 4 forward on k, 8 backward, 6 on q, times D F a head."""
        part, hidden = self.fast_in.columns, self.fast_in.rows
        return super().flops(mean) + 18 * self.fast_heads * part * hidden

    def kv_bytes(self) -> int:
        return 0

    def state_bytes(self) -> int:
        return self._fast_bytes() + (self.window or 0) * self._token_bytes()

    def cache_bytes(self, tokens: int) -> int:
        return self._fast_bytes() + min(tokens, self.window or 0) * self._token_bytes()

    def _token_bytes(self) -> int:
        wide: int = DTYPES[self.dtype].itemsize
        return 2 * self.kv_heads * self.head_dim * wide

    def _fast_bytes(self) -> int:
        """Weights, their running gradients, and a chunk of keys, values, rates and betas."""
        part, hidden, n = self.fast_in.columns, self.fast_in.rows, self.fast_heads
        matrices = 3 * part * hidden * (1 if self.rule == "sgd" else 2)
        wide: int = max(4, DTYPES[self.dtype].itemsize)
        return n * (matrices + self.chunk * (2 * part + 4)) * wide

    def expand(self, ops: Ops, x: Value) -> Value:
        return ops.inline("o", self.o, self._expanded(ops, x))

    def _expanded(self, ops: Ops, x: Value) -> Value:
        """What `mixed` computes, in ops."""

        def split(name: str, unit: Linear, count: int) -> Value:
            return ops("heads_first", ops("heads", ops.inline(name, unit, x), count=count))

        def fast(x: Value) -> Value:
            return ops("heads_first", ops("heads", x, count=self.fast_heads))

        q, k = (ops("heads", ops.inline(n, u, x), count=c) for n, u, c in self._pair())
        v = split("v", self.v, self.kv_heads)
        if self.qk_norm:
            q, k = ops.inline("q_norm", self.q_norm, q), ops.inline("k_norm", self.k_norm, k)
        q, k = ops("heads_first", q), ops("heads_first", k)
        group = self.heads // self.kv_heads
        whole = [ops("join_heads", t) for t in (q, *(ops("repeat_heads", t, times=group) for t in (k, v)))]
        whole[:2] = (
            ops.inline("q_affine", self.q_affine, whole[0]),
            ops.inline("k_affine", self.k_affine, whole[1]),
        )
        read = [fast(ops("activate", t, form="silu")) for t in whole]
        betas = ops("pick", split("momentum", self.momentum, self.fast_heads)) if self.rule != "sgd" else None
        weights = [ops.inline(n, getattr(self, n), x) for n in ("fast_in", "fast_gate", "fast_out")]
        close, far = ops.many("parts", ops.past)
        learned, far = ops.many(
            "learn", *read, split("rate", self.rate, self.fast_heads), betas, *weights, ops.step, far,
            chunk=self.chunk, rule=self.rule,
        )  # fmt: skip
        shares = ops("activate", split("gate", self.gate, self.fast_heads), form="silu")
        learned = ops("gate", ops.inline("norm", self.norm, learned), shares)
        turned = [q, k]
        if self.rope is not None:
            turned = [ops("rope", t, ops.step, parameters=self.rope) for t in turned]
        more = {"window": self.window, "scale": self.factor, "cap": self.cap}
        y, close = ops.many("near", turned[0], turned[1], v, ops.step, close, **more)
        ops.graph.state = ops("both", close, far).number
        return ops("add", ops("join_heads", y), ops("join_heads", learned))

    def _pair(self) -> tuple[tuple[str, Linear, int], ...]:
        return (("q", self.q, self.heads), ("k", self.k, self.kv_heads))

    def mixed(self, x: Tensor, step: Step) -> Tensor:
        batch, length = x.shape[:2]
        q = self.q(x).view(batch, length, self.heads, self.head_dim)
        k = self.k(x).view(batch, length, self.kv_heads, self.head_dim)
        v = self.v(x).view(batch, length, self.kv_heads, self.head_dim)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        learned = self._learned(x, q, k, v, step)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.rope is not None:
            cos, sin = tables(self.rope, self.head_dim, step, x.dtype)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        window = self.window or 1
        if step.cache is not None:
            k, v, slots = step.cache.slide(self, k, v, window)
        else:
            slots = step.slots(length)
        y = near(q, k, v, slots, step, window, self.factor, self.cap)
        return y.transpose(1, 2).reshape(batch, length, -1) + learned

    def _learned(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """What the fast network adds [B, T, H h]"""
        batch, length, n = *x.shape[:2], self.fast_heads
        group = self.heads // self.kv_heads

        def split(t: Tensor) -> Tensor:
            return t.view(batch, length, n, -1).transpose(1, 2)

        whole = [q.flatten(2), *(t.repeat_interleave(group, 2).flatten(2) for t in (k, v))]
        past = step.cache.state(self) if step.cache is not None else None
        y, state = learn(
            split(F.silu(self.q_affine(whole[0]))),
            split(F.silu(self.k_affine(whole[1]))),
            split(F.silu(whole[2])),
            split(self.rate(x)),
            split(self.momentum(x))[..., 0] if self.rule != "sgd" else None,
            (self.fast_in(), self.fast_gate(), self.fast_out()),
            past,
            step,
            self.chunk,
            self.rule,
        )
        if step.cache is not None:
            step.cache.keep(self, *state)
        shared: Tensor = self.norm(y) * F.silu(split(self.gate(x)))
        return shared.transpose(1, 2).reshape(batch, length, -1)
