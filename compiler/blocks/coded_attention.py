"""CodedAttention: softmax attention whose queries, keys, values and probabilities lie on grids of few codes.

Shapes: q [B, H, T, h], k and v [B, Hk, S, h], probabilities p [B, H, T, S].
Stored: a scale [1] float32 and a zero point [1] int16 each for q, k and v, and the scale D [1] float32 of the
probabilities' grid.
Source: RepQuant, arXiv 2402.05628, section on the quantizer of the softmax.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, Unpack

import torch
from torch import Tensor

from effc.compiler.blocks.attention import Attention, AttentionForm
from effc.compiler.blocks.coded_linear import on_grid
from effc.compiler.blocks.echo_attention import probabilities, weighted
from effc.compiler.blocks.unit import empty_buffer
from effc.compiler.step import Step

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value

Curve = Literal["log_sqrt2", "log2", "uniform", "none"]
"""log_sqrt2: steps of a factor sqrt 2; log2: of 2; uniform: equal steps; none: probabilities as they are."""


class CodedAttention(Attention):
    """y = W_o c(softmax(mask(cap(scale q' k'^T)))) v', with q', k', v' on uniform grids and c on a curve's.

    log_sqrt2: n = round(-2 log2(p / D)), c = D 2^(-ceil(n / 2)), times sqrt 2 where n is odd: a shift and one
    of two constants. n of 2^bits and more is 0. The cache holds k' and v', which the grids map to themselves.
    """

    q_scale: Tensor
    q_zero: Tensor
    k_scale: Tensor
    k_zero: Tensor
    v_scale: Tensor
    v_zero: Tensor
    p_scale: Tensor

    def __init__(self, *, curve: Curve = "log_sqrt2", bits: int, **form: Unpack[AttentionForm]) -> None:
        """`bits` are those of a code of q, k, v and p."""
        super().__init__(**form)
        if not 2 <= bits <= 8:
            raise ValueError(f"{bits} bits; coded attention has 2 to 8")
        self.curve: Curve = curve
        self.bits = bits
        for name in ("q", "k", "v"):
            self.register_buffer(f"{name}_scale", empty_buffer(1, dtype="float32"))
            self.register_buffer(f"{name}_zero", empty_buffer(1, dtype="int16"))
        self.register_buffer("p_scale", empty_buffer(1, dtype="float32"))

    def stored(self) -> Iterator[tuple[Tensor, int]]:
        for tensor in self._buffers.values():
            if tensor is not None:
                yield tensor, 0

    def drawn(self, slot: str, dice: torch.Generator) -> Tensor | None:
        """Grids that numbers of order one fill."""
        if slot == "p_scale":
            return torch.ones(1)
        if slot.endswith("_zero"):
            return torch.zeros(1, dtype=torch.int16)
        return torch.full((1,), 4.0 / (1 << self.bits))

    def expand_attended(self, ops: Ops, x: Value, q: Value, k: Value, v: Value) -> Value:
        seen = ops("visible", ops.step, x, causal=self.causal, window=self.window)
        near = [
            ops("on_grid", t, ops.weight(f"{name}_scale"), ops.weight(f"{name}_zero"), bits=self.bits)
            for name, t in (("q", q), ("k", k), ("v", v))
        ]
        given = {"scale": self.factor, "cap": self.cap, "curve": self.curve, "bits": self.bits}
        y, state = ops.many("attend_coded", *near, seen, ops.weight("p_scale"), ops.past, **given)
        ops.graph.state = state.number
        return y

    def attended(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        q = on_grid(q, self.q_scale, self.q_zero, self.bits)
        k = on_grid(k, self.k_scale, self.k_zero, self.bits)
        v = on_grid(v, self.v_scale, self.v_zero, self.bits)
        mask, ordered = step.mask(q.shape[2], self.causal, self.window)
        if step.cache is not None:
            k, v = step.cache.extend(self, k, v)
        p = probabilities(q, k, mask, ordered, self.factor, self.cap)
        return weighted(on_curve(p, self.p_scale, self.curve, self.bits), v)


def steps_down(p: Tensor, scale: Tensor, curve: Curve) -> Tensor:
    """How many steps of a logarithmic curve p [...] lies below D, rounded; infinite where p is 0."""
    return torch.round(torch.log2(p / scale) * (-2.0 if curve == "log_sqrt2" else -1.0))


def on_curve(p: Tensor, scale: Tensor, curve: Curve, bits: int) -> Tensor:
    """The points of a curve that stand for probabilities p [...], in p's dtype."""
    if curve == "none":
        return p
    wide = p.float() if p.dtype in (torch.float16, torch.bfloat16) else p
    last = (1 << bits) - 1
    if curve == "uniform":
        size = scale / last
        return (torch.round(wide / size).clamp(0, last) * size).to(p.dtype)
    n = steps_down(wide, scale, curve)
    near = n.clamp(0, last)
    if curve == "log2":
        held = torch.exp2(-near)
    else:
        held = torch.exp2(-torch.ceil(near / 2)) * torch.where(near % 2 == 1, math.sqrt(2.0), 1.0)
    return torch.where(n > last, 0.0, held * scale).to(p.dtype)
