"""Low-rank changes behind a gate: one with a gate of its own, and several of which each token takes the best.

Shapes: x [..., i], base W [o, i] dense or packed, Z changes of rank r: A [Z, r, i], B [Z, o, r], gates
[Z, i].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effc.compiler.blocks.linear import Linear
from effc.compiler.blocks.lora_linear import Base
from effc.compiler.blocks.moe import best
from effc.compiler.blocks.unit import Unit, empty

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value


class GatedLora(Unit):
    """y = base(x) + sigmoid(v x) scale B A x: what a gate is trained in."""

    a: nn.Parameter
    b: nn.Parameter
    gate: nn.Parameter
    base: Base

    def __init__(
        self,
        *,
        in_features: int,
        out_features: int,
        rank: int,
        scale: float,
        bias: bool = False,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.scale = scale
        self.bias = bias
        self.dtype = dtype
        self.base = Linear(in_features=in_features, out_features=out_features, bias=bias, dtype=dtype)
        self.a = empty(rank, in_features, dtype=dtype)
        self.b = empty(out_features, rank, dtype=dtype)
        self.gate = empty(1, in_features, dtype=dtype)

    def flops(self, mean: int) -> int:
        return 2 * self.rank * (self.in_features + self.out_features) + 2 * self.in_features

    def expand(self, ops: Ops, x: Value) -> Value:
        a, b, v = (ops("cast_like", ops.weight(name), x) for name in ("a", "b", "gate"))
        low = ops("scale", ops("linear", x, a, None), factor=self.scale)
        share = ops("sigmoid", ops("linear", x, v, None))
        return ops("add", ops.inline("base", self.base, x), ops("gate", ops("linear", low, b, None), share))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.a.to(x.dtype))
        share = torch.sigmoid(F.linear(x, self.gate.to(x.dtype)))
        y: Tensor = self.base(x) + F.linear(low * low.new_tensor(self.scale), self.b.to(x.dtype)) * share
        return y


class RoutedLora(Unit):
    """y = base(x) + sum over the k best z of w_z B_z A_z x.

    The score of z is x' v_z, with x' the token's inputs at mean 0 and deviation 1, and v_z stored so as well,
    over sqrt(i); w is the softmax of the k largest. The scale of each change is inside its B.
    """

    a: nn.Parameter
    b: nn.Parameter
    gates: nn.Parameter
    base: Base

    def __init__(
        self,
        *,
        in_features: int,
        out_features: int,
        rank: int,
        experts: int,
        active: int,
        bias: bool = False,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        if not 1 <= active <= experts:
            raise ValueError(f"{active} active changes of {experts}")
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.experts = experts
        self.active = active
        self.bias = bias
        self.dtype = dtype
        self.base = Linear(in_features=in_features, out_features=out_features, bias=bias, dtype=dtype)
        self.a = empty(experts, rank, in_features, dtype=dtype)
        self.b = empty(experts, out_features, rank, dtype=dtype)
        self.gates = empty(experts, in_features, dtype=dtype)

    def flops(self, mean: int) -> int:
        sides = self.in_features + self.out_features
        return 2 * self.in_features * self.experts + 2 * self.active * self.rank * sides

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, i] -> weights [N, k] of x's dtype, chosen [N, k]."""
        scores = F.linear(standardized(x), self.gates.to(x.dtype))
        wide = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
        weights, chosen = best(torch.softmax(wide, -1), self.active, renormalize=True)
        return weights.to(x.dtype), chosen

    def expand(self, ops: Ops, x: Value) -> Value:
        base = ops.inline("base", self.base, x)
        flat = ops("flatten", x)
        gates = ops("cast_like", ops.weight("gates"), x)
        scores = ops("linear", ops("standardize", flat), gates, None)
        weights, chosen = ops.many("route", scores, flat, active=self.active, renormalize=True)
        low = ops("expert_linear", ops("spread", flat, chosen), ops.weight("a"), chosen)
        change = ops("combine", ops("expert_linear", low, ops.weight("b"), chosen), weights)
        return ops("add", base, ops("shape_like", change, base))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if x.is_meta:
            return y
        flat = x.reshape(-1, self.in_features)
        weights, chosen = self.route(flat)
        change = y.new_zeros(len(flat), self.out_features)
        for expert in range(self.experts):
            rows, place = torch.where(chosen == expert)
            if rows.numel():
                low = F.linear(flat[rows], self.a[expert].to(x.dtype))
                part = F.linear(low, self.b[expert].to(x.dtype)) * weights[rows, place, None]
                change = change.index_add(0, rows, part)
        return y + change.view_as(y)


def standardized(x: Tensor) -> Tensor:
    """x [N, i] -> mean 0 and deviation 1 over its inputs, without a gain."""
    return F.layer_norm(x, (x.shape[-1],))
