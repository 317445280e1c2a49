"""MoE: a mixture of feed-forward experts, each token through its k best, none dropped.

Shapes: N = B * T tokens, E experts, k active ones, d width, f hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effc.compiler.blocks.linear import Linear, StackedLinear
from effc.compiler.blocks.mlp import ACTIVATIONS, Activation
from effc.compiler.blocks.unit import Unit

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value


class Experts(Unit):
    """E gated feed-forward networks, their weights stacked: gate, up [E, f, d], down [E, d, f]."""

    def __init__(
        self,
        *,
        width: int,
        hidden: int,
        experts: int,
        activation: Activation = "silu",
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        self.width = width
        self.hidden = hidden
        self.experts = experts
        self.activation = activation
        self.dtype = dtype
        self.gate = StackedLinear(experts=experts, in_features=width, out_features=hidden, dtype=dtype)
        self.up = StackedLinear(experts=experts, in_features=width, out_features=hidden, dtype=dtype)
        self.down = StackedLinear(experts=experts, in_features=hidden, out_features=width, dtype=dtype)

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """x [N, d], weights [N, k], chosen [N, k] int64 -> sum over k of weight times expert, [N, d]."""
        out = torch.zeros_like(x)
        if x.is_meta:
            return out  # which rows an expert gets is data
        act = ACTIVATIONS[self.activation]
        for expert in range(self.experts):
            rows, place = torch.where(chosen == expert)
            if rows.numel() == 0:
                continue
            part = x[rows]
            y = self.down(act(self.gate(part, expert)) * self.up(part, expert), expert)
            out = out.index_add(0, rows, y * weights[rows, place, None])
        return out


class MoE(Unit):
    """p = softmax(router x) in float32; the k largest, renormalised to sum one when `renormalize`."""

    def __init__(
        self,
        *,
        width: int,
        hidden: int,
        experts: int,
        active: int,
        activation: Activation = "silu",
        renormalize: bool = True,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        if active > experts:
            raise ValueError(f"{active} active experts of {experts}")
        self.width = width
        self.hidden = hidden
        self.n_experts = experts
        self.active = active
        self.activation = activation
        self.renormalize = renormalize
        self.dtype = dtype
        self.router = Linear(in_features=width, out_features=experts, dtype=dtype)
        self.experts = Experts(
            width=width, hidden=hidden, experts=experts, activation=activation, dtype=dtype
        )

    def spec(self) -> dict[str, Any]:
        return super().spec() | {"experts": self.n_experts}

    def flops(self, mean: int) -> int:
        return self.active * 6 * self.width * self.hidden

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, d] -> weights [N, k] of x's dtype, chosen [N, k]."""
        scores = self.router(x)
        wide = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
        weights, chosen = torch.topk(torch.softmax(wide, -1), self.active, dim=-1)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(x.dtype), chosen

    def expand(self, ops: Ops, x: Value) -> Value:
        flat = ops("flatten", x)
        scores = ops.inline("router", self.router, flat)
        settings = {"active": self.active, "renormalize": self.renormalize}
        weights, chosen = ops.many("route", scores, flat, **settings)
        copies = ops("spread", flat, chosen)
        gate = ops("expert_linear", copies, ops.stacked("experts.gate", self.experts.gate), chosen)
        up = ops("expert_linear", copies, ops.stacked("experts.up", self.experts.up), chosen)
        inner = ops("gate", ops("activate", gate, form=self.activation), up)
        down = ops("expert_linear", inner, ops.stacked("experts.down", self.experts.down), chosen)
        return ops("shape_like", ops("combine", down, weights), x)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.route(flat)
        out: Tensor = self.experts(flat, weights, chosen)
        return out.view_as(x)
