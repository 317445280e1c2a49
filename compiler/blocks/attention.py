"""Attention: multi-head, grouped or windowed, with rotary positions, q/k norms and soft-capping.

Shapes: x [B, T, d], q [B, H, T, h], k and v [B, Hk, S, h] with S keys; H query heads, Hk key heads, h width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Required, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from effc.compiler.blocks.head import softcap
from effc.compiler.blocks.linear import Linear
from effc.compiler.blocks.norm import Norm
from effc.compiler.blocks.rope import checked, rotate, tables
from effc.compiler.blocks.unit import DTYPES, Unit
from effc.compiler.step import Step

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value


class AttentionForm(TypedDict, total=False):
    """The arguments of `Attention`, for blocks that have more of their own."""

    width: Required[int]
    heads: Required[int]
    kv_heads: Required[int]
    head_dim: Required[int]
    bias: bool
    bias_o: bool
    rope: Mapping[str, Any] | None
    qk_norm: float
    window: int | None
    causal: bool
    cap: float | None
    scale: float | None
    dtype: str


class Attention(Unit):
    """y = W_o softmax(mask(cap(scale q k^T))) v, with q, k, v = W x (+ b), normed and rotated where asked."""

    takes_step = True

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        bias: bool = False,
        bias_o: bool = False,
        rope: Mapping[str, Any] | None = None,
        qk_norm: float = 0.0,
        window: int | None = None,
        causal: bool = True,
        cap: float | None = None,
        scale: float | None = None,
        dtype: str = "float32",
    ) -> None:
        """`qk_norm`: eps of the norms over each head of q and k (0: none); `window`: keys a query may see."""
        super().__init__()
        if 0 in (width, heads, head_dim):
            raise ValueError(f"width {width}, {heads} heads of {head_dim}: none may be 0")
        if kv_heads == 0 or heads % kv_heads:
            raise ValueError(f"{heads} query heads do not divide over {kv_heads} key heads")
        self.width = width
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.bias = bias
        self.bias_o = bias_o
        self.rope = checked(rope, head_dim) if rope is not None else None
        self.qk_norm = qk_norm
        self.window = window
        self.causal = causal
        self.cap = cap
        self.scale = scale
        self.dtype = dtype
        inner, outer = heads * head_dim, kv_heads * head_dim
        self.q = Linear(in_features=width, out_features=inner, bias=bias, dtype=dtype)
        self.k = Linear(in_features=width, out_features=outer, bias=bias, dtype=dtype)
        self.v = Linear(in_features=width, out_features=outer, bias=bias, dtype=dtype)
        self.o = Linear(in_features=inner, out_features=width, bias=bias_o, dtype=dtype)
        if qk_norm:
            self.q_norm = Norm(width=head_dim, eps=qk_norm, dtype=dtype)
            self.k_norm = Norm(width=head_dim, eps=qk_norm, dtype=dtype)

    @property
    def factor(self) -> float:
        """What scores are multiplied by: 1 / sqrt(h) unless the model says otherwise."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def flops(self, mean: int) -> int:
        keys = mean if self.window is None else min(mean, self.window)
        return 4 * keys * self.heads * self.head_dim

    def kv_bytes(self) -> int:
        return 2 * self.kv_heads * self.head_dim * DTYPES[self.dtype].itemsize if self.causal else 0

    def expand(self, ops: Ops, x: Value) -> Value:
        return ops.inline("o", self.o, self.expand_mixed(ops, x))

    def expand_mixed(self, ops: Ops, x: Value) -> Value:
        """What `mixed` computes, in ops."""
        q = ops("heads", ops.inline("q", self.q, x), count=self.heads)
        k = ops("heads", ops.inline("k", self.k, x), count=self.kv_heads)
        v = ops("heads", ops.inline("v", self.v, x), count=self.kv_heads)
        if self.qk_norm:
            q, k = ops.inline("q_norm", self.q_norm, q), ops.inline("k_norm", self.k_norm, k)
        q, k, v = ops("heads_first", q), ops("heads_first", k), ops("heads_first", v)
        if self.rope is not None:
            q, k = (ops("rope", t, ops.step, parameters=self.rope) for t in (q, k))
        return ops("join_heads", self.expand_attended(ops, x, q, k, v))

    def expand_attended(self, ops: Ops, x: Value, q: Value, k: Value, v: Value) -> Value:
        """What `attended` computes, in ops."""
        seen = ops("visible", ops.step, x, causal=self.causal, window=self.window)
        y, state = ops.many("attend", q, k, v, seen, ops.past, scale=self.factor, cap=self.cap)
        ops.graph.state = state.number
        return y

    def forward(self, x: Tensor, step: Step) -> Tensor:
        out: Tensor = self.o(self.mixed(x, step))
        return out

    def mixed(self, x: Tensor, step: Step) -> Tensor:
        """x [B, T, d] -> the values that each head takes in, side by side [B, T, H h], before W_o."""
        y = self.attended(*self.projected(x, step), step)
        return y.transpose(1, 2).reshape(*x.shape[:2], self.heads * self.head_dim)

    def projected(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, d] -> q [B, H, T, h] and k, v [B, Hk, T, h], normed and rotated where asked."""
        batch, length = x.shape[:2]
        q = self.q(x).view(batch, length, self.heads, self.head_dim)
        k = self.k(x).view(batch, length, self.kv_heads, self.head_dim)
        v = self.v(x).view(batch, length, self.kv_heads, self.head_dim)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.rope is not None:
            cos, sin = tables(self.rope, self.head_dim, step, x.dtype)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q, k, v

    def attended(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """q [B, H, T, h] over k, v [B, Hk, T, h] and those before them -> [B, H, T, h]."""
        mask, ordered = step.mask(q.shape[2], self.causal, self.window)
        if step.cache is not None:
            k, v = step.cache.extend(self, k, v)
        return attend(q, k, v, mask, ordered, self.factor, self.cap)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, ordered: bool, scale: float, cap: float | None
) -> Tensor:
    """q [B, H, T, h], k, v [B, Hk, S, h], mask [B or 1, 1, T, S] bool -> [B, H, T, h].

    `ordered` says that query t sees keys 0..t (T equals S); soft-capping needs the scores themselves.
    """
    grouped = q.shape[1] != k.shape[1]
    if cap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=ordered, scale=scale, enable_gqa=grouped
        )
    if grouped:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = softcap(q @ k.transpose(2, 3) * scale, cap)
    if ordered:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    wide = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    return torch.softmax(wide, -1).to(q.dtype) @ v
