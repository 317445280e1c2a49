"""Tempered: a mixture whose gate is dense and grows sharp in training; small weights are left out after it.

Shapes: N = B * T tokens, E experts, d width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from effc.compiler.blocks.linear import Linear
from effc.compiler.blocks.mlp import ACTIVATIONS, Activation
from effc.compiler.blocks.moe import Experts, Scope
from effc.compiler.blocks.unit import Unit

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value

Gate = Literal["sigmoid", "tanh", "gelu", "none"]


def gated(scores: Tensor, act: str) -> Tensor:
    """The scores as the softmax takes them: bounded or bent, unless `act` is none."""
    if act == "sigmoid":
        return torch.sigmoid(scores)
    return scores if act == "none" else ACTIVATIONS[act](scores)


def kept(p: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """p [N, E] -> weights [N, E] and numbers [N, E]: those of at least `least`, made to sum to one; E else.

    The largest weight always stays.
    """
    stay = (p >= least) | (p == p.amax(-1, keepdim=True))
    weights = p * stay
    number = torch.arange(p.shape[-1], device=p.device).expand_as(p)
    return weights / weights.sum(-1, keepdim=True), number.where(stay, p.shape[-1])


class Tempered(Unit):
    """y = sum_e w_e FFN_e(x), w = softmax(act(W x + b) / tau); w below `least` is dropped, the rest made one.

    `tau` holds outside of training, where nothing is dropped and tau falls from `start` to it exponentially.
    """

    def __init__(
        self,
        *,
        width: int,
        hidden: int,
        experts: int,
        act: Gate = "sigmoid",
        start: float = 2.0,
        tau: float = 0.3,
        least: float = 0.0,
        activation: Activation = "silu",
        gated: bool = True,
        balance: float = 0.0,
        scope: Scope = "micro",
        pooled: bool = False,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        if not 0 < tau <= start:
            raise ValueError(f"tau falls from {start:g} to {tau:g}; it must be above 0 and not rise")
        self.width = width
        self.hidden = hidden
        self.n_experts = experts
        self.act = act
        self.start = start
        self.tau = tau
        self.least = least
        self.activation: Activation = activation
        self.gated = gated
        self.balance = balance
        self.scope: Scope = scope
        self.pooled = pooled
        self.dtype = dtype
        self.progress = 0.0
        self.router = Linear(in_features=width, out_features=experts, bias=True, dtype=dtype)
        self.experts = Experts(
            width=width, hidden=hidden, experts=experts, activation=activation, gated=gated, dtype=dtype
        )

    def spec(self) -> dict[str, Any]:
        return super().spec() | {"experts": self.n_experts}

    def flops(self, mean: int) -> int:
        """All experts are counted; fewer run where weights are dropped, which depends on the text."""
        return self.n_experts * (6 if self.gated else 4) * self.width * self.hidden

    @property
    def heat(self) -> float:
        """tau now."""
        return self.start * (self.tau / self.start) ** self.progress if self.training else self.tau

    def probabilities(self, x: Tensor) -> Tensor:
        """x [N, d] -> [N, E], in float32 at least."""
        scores: Tensor = self.router(x)
        wide = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
        return torch.softmax(gated(wide, self.act) / self.heat, -1)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, d] -> weights [N, E] of x's dtype, numbers [N, E], E for an expert that is left out."""
        weights, chosen = kept(self.probabilities(x), 0.0 if self.training else self.least)
        return weights.to(x.dtype), chosen

    def expand(self, ops: Ops, x: Value) -> Value:
        flat = ops("flatten", x)
        scores = ops.inline("router", self.router, flat)
        weights, chosen = ops.many("temper", scores, flat, act=self.act, tau=self.tau, least=self.least)
        said = self.experts.expand_chosen(ops, flat, chosen)
        return ops("shape_like", ops("combine", said, weights), x)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.route(flat)
        out: Tensor = self.experts(flat, weights, chosen)
        return out.view_as(x)
