"""Carved: a feed-forward block in slices, of which a token runs through the common one and one of its own.

Shapes: B sequences of T tokens, N = B * T, E experts, d width, f channels of the dense block, R common and O
own channels of each expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from effc.compiler.blocks.mlp import MLP, Activation
from effc.compiler.blocks.moe import Experts
from effc.compiler.blocks.unit import Unit, empty_buffer
from effc.compiler.step import Step

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value

EXPERT = "expert"
"""Name among the sides of a step: the expert [B, T] of every token, for all layers."""


class Channels(Unit):
    """Which channels of the dense block the slices are: common [R], own [E, O], int32; no weights."""

    common: Tensor
    own: Tensor

    def __init__(self, *, shared: int, experts: int, own: int) -> None:
        super().__init__()
        self.shared = shared
        self.experts = experts
        self.own_size = own
        self.register_buffer("common", empty_buffer(shared, dtype="int32"))
        self.register_buffer("own", empty_buffer(experts, own, dtype="int32"))

    def spec(self) -> dict[str, Any]:
        return {
            "type": "Channels",
            "shared": self.shared,
            "experts": self.experts,
            "own": self.own_size,
        }

    def stored(self) -> Iterator[tuple[Tensor, int]]:
        yield self.common, 0
        yield self.own, 0


class Carved(Unit):
    """y = FFN[common] x + FFN[own of e] x, with e the expert that the step names for the token.

    Both parts are slices of one block: the same as that block with the channels of other experts at zero.
    """

    takes_step = True

    def __init__(
        self,
        *,
        width: int,
        shared: int,
        experts: int,
        own: int,
        activation: Activation = "silu",
        gated: bool = True,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        self.width = width
        self.n_shared = shared
        self.n_experts = experts
        self.own = own
        self.activation: Activation = activation
        self.gated = gated
        self.dtype = dtype
        if shared:
            self.shared = MLP(width=width, hidden=shared, activation=activation, gated=gated, dtype=dtype)
        if own:
            self.experts = Experts(
                width=width, hidden=own, experts=experts, activation=activation, gated=gated, dtype=dtype
            )
        self.channels = Channels(shared=shared, experts=experts, own=own)

    def spec(self) -> dict[str, Any]:
        return {
            "type": "Carved",
            "width": self.width,
            "shared": self.n_shared,
            "experts": self.n_experts,
            "own": self.own,
            "activation": self.activation,
            "gated": self.gated,
            "dtype": self.dtype,
        }

    def flops(self, mean: int) -> int:
        return (6 if self.gated else 4) * self.width * self.own

    def expand(self, ops: Ops, x: Value) -> Value:
        parts = [ops.inline("shared", self.shared, x)] if self.n_shared else []
        if self.own:
            flat = ops("flatten", x)
            chosen = ops("told", ops.step, side=EXPERT)
            said = self.experts.expand_chosen(ops, flat, chosen)
            parts.append(ops("shape_like", ops("first_copy", said), x))
        return parts[0] if len(parts) == 1 else ops("add", *parts)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        parts: list[Tensor] = [self.shared(x)] if self.n_shared else []
        if self.own:
            flat = x.reshape(-1, x.shape[-1])
            chosen = step.sides[EXPERT].reshape(-1, 1)
            parts.append(self.experts(flat, flat.new_ones(chosen.shape), chosen).view_as(x))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]
