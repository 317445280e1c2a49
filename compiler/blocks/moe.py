"""MoE: a mixture of feed-forward experts, each token through its k best, none dropped outside of training.

Shapes: N = B * T tokens, E experts, k active ones, d width, f hidden.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from effc.compiler.blocks.linear import Linear, StackedLinear
from effc.compiler.blocks.mlp import ACTIVATIONS, Activation
from effc.compiler.blocks.unit import Unit

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value

Scope = Literal["micro", "global"]


class Experts(Unit):
    """E feed-forward networks, weights stacked: gate, up [E, f, d], down [E, d, f]; `gated` as in MLP."""

    def __init__(
        self,
        *,
        width: int,
        hidden: int,
        experts: int,
        activation: Activation = "silu",
        gated: bool = True,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        self.width = width
        self.hidden = hidden
        self.experts = experts
        self.activation: Activation = activation
        self.gated = gated
        self.dtype = dtype
        if gated:
            self.gate = StackedLinear(experts=experts, in_features=width, out_features=hidden, dtype=dtype)
        self.up = StackedLinear(experts=experts, in_features=width, out_features=hidden, dtype=dtype)
        self.down = StackedLinear(experts=experts, in_features=hidden, out_features=width, dtype=dtype)

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """x [N, d], weights [N, k], chosen [N, k] int64 -> sum over k of weight times expert, [N, d].

        Rows are grouped by expert, so each expert that is chosen runs once, and no other runs. The number E
        stands for no expert. The terms of a row add up in its own order, however its rows were grouped.
        """
        if x.is_meta:
            return torch.zeros_like(x)  # which rows an expert gets is data
        active = chosen.shape[1]
        slots = chosen.flatten()
        order = slots.argsort(stable=True)
        counts = torch.bincount(slots, minlength=self.experts + 1).tolist()
        parts = []
        for expert, rows in enumerate(order.split(counts)):
            if expert == self.experts:
                parts.append(x.new_zeros(len(rows), x.shape[1]))
            elif len(rows):
                parts.append(self.expert(x[rows // active], expert))
        sorted_back = torch.empty_like(order).index_put_((order,), torch.arange(len(order), device=x.device))
        y = torch.cat(parts)[sorted_back].view(*chosen.shape, -1)
        return (y * weights.unsqueeze(-1)).sum(1)

    def expand_chosen(self, ops: Ops, x: Value, chosen: Value) -> Value:
        """x [N, d], chosen [N, k] -> what each chosen expert says [N, k, d], in ops of the block whose
        `experts` these are.
        """
        copies = ops("spread", x, chosen)
        inner = ops("expert_linear", copies, ops.stacked("experts.up", self.up), chosen)
        if self.gated:
            gate = ops("expert_linear", copies, ops.stacked("experts.gate", self.gate), chosen)
            inner = ops("gate", ops("activate", gate, form=self.activation), inner)
        else:
            inner = ops("activate", inner, form=self.activation)
        return ops("expert_linear", inner, ops.stacked("experts.down", self.down), chosen)

    def expert(self, x: Tensor, expert: int) -> Tensor:
        """x [n, d] through one expert -> [n, d]."""
        act = ACTIVATIONS[self.activation]
        up = self.up(x, expert)
        y: Tensor = self.down(act(self.gate(x, expert)) * up if self.gated else act(up), expert)
        return y


class MoE(Unit):
    """p = softmax(router x) in float32; the k largest, renormalised to sum one when `renormalize`.

    Of equal probabilities the lower number wins. The last five arguments act in training alone: `balance` is
    the weight of the loss of `compiler/auxiliary.py`, `scope` what its shares count, `pooled` whether layers
    share one such loss, `capacity` the tokens an expert takes at most, in parts of k N / E (0: all), `jitter`
    the range in which inputs of the router are scaled at random.
    """

    def __init__(
        self,
        *,
        width: int,
        hidden: int,
        experts: int,
        active: int,
        activation: Activation = "silu",
        gated: bool = True,
        renormalize: bool = True,
        balance: float = 0.0,
        scope: Scope = "micro",
        pooled: bool = False,
        capacity: float = 0.0,
        jitter: float = 0.0,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        if active > experts:
            raise ValueError(f"{active} active experts of {experts}")
        self.width = width
        self.hidden = hidden
        self.n_experts = experts
        self.active = active
        self.activation: Activation = activation
        self.gated = gated
        self.renormalize = renormalize
        self.balance = balance
        self.scope: Scope = scope
        self.pooled = pooled
        self.capacity = capacity
        self.jitter = jitter
        self.dtype = dtype
        self.router = Linear(in_features=width, out_features=experts, dtype=dtype)
        self.experts = Experts(
            width=width, hidden=hidden, experts=experts, activation=activation, gated=gated, dtype=dtype
        )

    def spec(self) -> dict[str, Any]:
        return super().spec() | {"experts": self.n_experts}

    def flops(self, mean: int) -> int:
        return self.active * (6 if self.gated else 4) * self.width * self.hidden

    def probabilities(self, x: Tensor) -> Tensor:
        """x [N, d] -> the probability of every expert [N, E], in float32 at least."""
        scores: Tensor = self.router(x)
        wide = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
        return torch.softmax(wide, -1)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, d] -> weights [N, k] of x's dtype, chosen [N, k], E where an expert was full."""
        if self.training and self.jitter:
            noise = torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
            weights, chosen = best(self.probabilities(x * noise), self.active, self.renormalize)
        else:
            weights, chosen = best(self.probabilities(x), self.active, self.renormalize)
        if self.training and self.capacity:
            chosen = self.admitted(chosen)
        return weights.to(x.dtype), chosen

    def admitted(self, chosen: Tensor) -> Tensor:
        """chosen [N, k], with E for each slot that comes when its expert has its share; first slots first."""
        seats = math.ceil(self.capacity * chosen.numel() / self.n_experts)
        first = chosen.t().flatten()
        taken = torch.nn.functional.one_hot(first, self.n_experts).cumsum(0).gather(1, first[:, None])[:, 0]
        return first.where(taken <= seats, self.n_experts).view(chosen.shape[::-1]).t()

    def expand(self, ops: Ops, x: Value) -> Value:
        flat = ops("flatten", x)
        scores = ops.inline("router", self.router, flat)
        settings = {"active": self.active, "renormalize": self.renormalize}
        weights, chosen = ops.many("route", scores, flat, **settings)
        said = self.experts.expand_chosen(ops, flat, chosen)
        return ops("shape_like", ops("combine", said, weights), x)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.route(flat)
        out: Tensor = self.experts(flat, weights, chosen)
        return out.view_as(x)


def best(p: Tensor, active: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """p [N, E] -> the k largest [N, k] and their numbers [N, k]; of equal ones the lower number first."""
    ranked, order = p.sort(dim=-1, descending=True, stable=True)
    weights, chosen = ranked[:, :active], order[:, :active]
    return (weights / weights.sum(-1, keepdim=True) if renormalize else weights), chosen
