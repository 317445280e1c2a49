"""Averaged: feed-forward networks that train side by side and compute, once trained, as their mean.

Shapes: x [B, T, d], N = B * T tokens, E networks of f channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effc.compiler.blocks.mlp import ACTIVATIONS, Activation
from effc.compiler.blocks.moe import Experts
from effc.compiler.blocks.unit import Unit

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value


class Averaged(Unit):
    """Outside of training the network whose weights are the mean of E; in training a token runs through one.

    In each training pass a fresh permutation deals the N tokens out to the E networks, N / E each (one more
    to the first, where E does not divide N). After each optimizer step the training loop draws every network
    towards the mean of the others: W_i <- (1 - b) W_i + b / (E - 1) sum of the others, with b rising from 0
    to `beta` when `ramp`. The mean stays as it is, what a network differs by shrinks by 1 - b E / (E - 1).
    """

    def __init__(
        self,
        *,
        width: int,
        hidden: int,
        experts: int,
        beta: float,
        ramp: bool = True,
        activation: Activation = "silu",
        gated: bool = True,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        self.width = width
        self.hidden = hidden
        self.n_experts = experts
        self.beta = beta
        self.ramp = ramp
        self.activation: Activation = activation
        self.gated = gated
        self.dtype = dtype
        self.experts = Experts(
            width=width, hidden=hidden, experts=experts, activation=activation, gated=gated, dtype=dtype
        )

    def spec(self) -> dict[str, Any]:
        return super().spec() | {"experts": self.n_experts}

    def flops(self, mean: int) -> int:
        return (6 if self.gated else 4) * self.width * self.hidden

    def mean(self, name: str) -> Tensor:
        """The mean weight [o, i] of gate, up or down."""
        weight: Tensor = getattr(self.experts, name).weight
        wide = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
        return wide.mean(0).to(weight.dtype)

    def pulled(self, weights: Tensor, progress: float) -> Tensor:
        """weights [E, o, i] after the step at `progress` (0 to 1) of a training, nearer to each other."""
        share = self.beta * (progress if self.ramp else 1.0) * self.n_experts / (self.n_experts - 1)
        return torch.lerp(weights, weights.mean(0, keepdim=True), share)

    def expand(self, ops: Ops, x: Value) -> Value:
        def linear(name: str, y: Value) -> Value:
            return ops(
                "linear", y, ops("mean_expert", ops.stacked(f"experts.{name}", getattr(self.experts, name)))
            )

        inner = linear("up", x)
        if self.gated:
            inner = ops("gate", ops("activate", linear("gate", x), form=self.activation), inner)
        else:
            inner = ops("activate", inner, form=self.activation)
        return linear("down", inner)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            flat = x.reshape(-1, x.shape[-1])
            order = torch.randperm(len(flat), device=x.device)
            dealt = torch.empty_like(order)
            for number, rows in enumerate(order.tensor_split(self.n_experts)):
                dealt[rows] = number
            one = flat.new_ones(len(flat), 1)
            out: Tensor = self.experts(flat, one, dealt[:, None])
            return out.view_as(x)
        act = ACTIVATIONS[self.activation]
        up = F.linear(x, self.mean("up"))
        inner = act(F.linear(x, self.mean("gate"))) * up if self.gated else act(up)
        return F.linear(inner, self.mean("down"))
