"""Attention that several layers share: one computes who looks at whom, the others take in values by it.

Shapes: x [B, T, d], q [B, H, T, h], k and v [B, Hk, S, h], map [B, H, T, S]; H query heads, Hk key heads.
Source: EchoAtt: Attend, Copy, then Adjust for More Efficient Large Language Models, arXiv 2409.14595.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Unpack

import torch
from torch import Tensor

from effc.compiler.blocks.attention import Attention, AttentionForm, attend
from effc.compiler.blocks.head import softcap
from effc.compiler.blocks.linear import Linear
from effc.compiler.blocks.unit import DTYPES, Unit
from effc.compiler.step import Step

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value

Maps = Literal["store", "recompute"]
"""store: the probabilities are handed on; recompute: queries and keys are, and each layer multiplies anew."""


class LeadAttention(Attention):
    """Attention as it is, which also hands on its map to the layers of its group, in the step."""

    def __init__(
        self,
        *,
        group: int,
        maps: Maps = "store",
        **form: Unpack[AttentionForm],
    ) -> None:
        """`group` is the name of the group, the same in all its layers."""
        super().__init__(**form)
        self.group = group
        self.maps: Maps = maps

    @property
    def says(self) -> str:
        """What `effc show` tells of it."""
        return f"map of group {self.group}"

    @property
    def tells(self) -> str:
        """The name under which the layers of the group find what this one tells."""
        return f"map {self.group}"

    def expand_attended(self, ops: Ops, x: Value, q: Value, k: Value, v: Value) -> Value:
        seen = ops("visible", ops.step, x, causal=self.causal, window=self.window)
        given = {"scale": self.factor, "cap": self.cap}
        past = ops.many("parts", ops.past)
        if self.maps == "recompute":
            y, state = ops.many("attend", q, k, v, seen, ops.past, **given)
            q = ops("tell", q, ops.step, q, side=f"{self.tells} queries")
            y = ops("tell", y, ops.step, ops.many("parts", state)[0], side=f"{self.tells} keys")
        else:
            probabilities, keys = ops.many("attention_map", q, k, seen, past[0], **given)
            y, values = ops.many("weigh", probabilities, v, past[1])
            y = ops("tell", y, ops.step, probabilities, side=self.tells)
            state = ops("both", keys, values)
        ops.graph.state = state.number
        return y

    def attended(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        mask, ordered = step.mask(q.shape[2], self.causal, self.window)
        if step.cache is not None:
            k, v = step.cache.extend(self, k, v)
        if self.maps == "recompute":
            step.sides[f"{self.tells} queries"], step.sides[f"{self.tells} keys"] = q, k
            return attend(q, k, v, mask, ordered, self.factor, self.cap)
        found = probabilities(q, k, mask, ordered, self.factor, self.cap)
        step.sides[self.tells] = found
        return weighted(found, v)


class EchoAttention(Unit):
    """y = W_o A W_v x, with A the map of another layer of the group; its cache holds values alone."""

    takes_step = True

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        group: int,
        maps: Maps = "store",
        bias: bool = False,
        bias_o: bool = False,
        window: int | None = None,
        causal: bool = True,
        cap: float | None = None,
        scale: float | None = None,
        dtype: str = "float32",
    ) -> None:
        """Heads, window, cap and scale are those of the layer whose map it is."""
        super().__init__()
        if 0 in (width, heads, kv_heads, head_dim) or heads % kv_heads:
            raise ValueError(f"{heads} query heads do not divide over {kv_heads} key heads of {head_dim}")
        self.width = width
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.group = group
        self.maps: Maps = maps
        self.bias = bias
        self.bias_o = bias_o
        self.window = window
        self.causal = causal
        self.cap = cap
        self.scale = scale
        self.dtype = dtype
        self.v = Linear(in_features=width, out_features=kv_heads * head_dim, bias=bias, dtype=dtype)
        self.o = Linear(in_features=heads * head_dim, out_features=width, bias=bias_o, dtype=dtype)

    @property
    def says(self) -> str:
        """What `effc show` tells of it."""
        return f"by the map of group {self.group}"

    @property
    def hears(self) -> str:
        """The name under which an earlier layer tells its map."""
        return f"map {self.group}"

    @property
    def factor(self) -> float:
        """What scores are multiplied by."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def flops(self, mean: int) -> int:
        keys = mean if self.window is None else min(mean, self.window)
        return (2 if self.maps == "store" else 4) * keys * self.heads * self.head_dim

    def kv_bytes(self) -> int:
        """Values alone: keys are those of the other layer."""
        return self.kv_heads * self.head_dim * DTYPES[self.dtype].itemsize if self.causal else 0

    def expand(self, ops: Ops, x: Value) -> Value:
        v = ops("heads_first", ops("heads", ops.inline("v", self.v, x), count=self.kv_heads))
        if self.maps == "store":
            y, state = ops.many("weigh", ops("heard", ops.step, side=self.hears), v, ops.past)
        else:
            q, k = (ops("heard", ops.step, side=f"{self.hears} {part}") for part in ("queries", "keys"))
            seen = ops("visible", ops.step, x, causal=self.causal, window=self.window)
            given = {"scale": self.factor, "cap": self.cap}
            y, state = ops.many("attend_again", q, k, v, seen, ops.past, **given)
        ops.graph.state = state.number
        return ops.inline("o", self.o, ops("join_heads", y))

    def forward(self, x: Tensor, step: Step) -> Tensor:
        batch, length = x.shape[:2]
        v = self.v(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        if step.cache is not None:
            v = step.cache.extend(self, v[..., :0], v)[1]
        if self.maps == "store":
            y = weighted(step.sides[self.hears], v)
        else:
            q, k = (step.sides[f"{self.hears} {part}"] for part in ("queries", "keys"))
            mask, ordered = step.mask(length, self.causal, self.window)
            y = attend(q, k, v, mask, ordered, self.factor, self.cap)
        out: Tensor = self.o(y.transpose(1, 2).reshape(batch, length, self.heads * self.head_dim))
        return out


def probabilities(
    q: Tensor, k: Tensor, mask: Tensor | None, ordered: bool, scale: float, cap: float | None
) -> Tensor:
    """q [B, H, T, h], k [B, Hk, S, h] -> softmax(mask(cap(scale q k^T))) [B, H, T, S], as `attend` has it."""
    if q.shape[1] != k.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ k.transpose(2, 3) * scale
    scores = scores if cap is None else softcap(scores, cap)
    if ordered:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    wide = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    return torch.softmax(wide, -1).to(q.dtype)


def weighted(map: Tensor, v: Tensor) -> Tensor:
    """map [B, H, T, S], v [B, Hk, S, h] -> [B, H, T, h]"""
    if map.shape[1] != v.shape[1]:
        v = v.repeat_interleave(map.shape[1] // v.shape[1], dim=1)
    return map @ v
