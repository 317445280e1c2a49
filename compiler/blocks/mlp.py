"""MLP: the feed-forward block, gated (SwiGLU and kin) or plain."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from effc.compiler.blocks.linear import Linear
from effc.compiler.blocks.unit import Unit

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu", "tanh"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "tanh": torch.tanh,
}


class MLP(Unit):
    """Gated: down(act(gate x) * up x). Plain: down(act(up x)).  x [B, T, width], inside [B, T, hidden]."""

    gate: Linear
    up: Linear
    down: Linear

    def __init__(
        self,
        *,
        width: int,
        hidden: int,
        activation: Activation = "silu",
        gated: bool = True,
        bias: bool = False,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        self.width = width
        self.hidden = hidden
        self.activation: Activation = activation
        self.gated = gated
        self.bias = bias
        self.dtype = dtype
        if gated:
            self.gate = Linear(in_features=width, out_features=hidden, bias=bias, dtype=dtype)
        self.up = Linear(in_features=width, out_features=hidden, bias=bias, dtype=dtype)
        self.down = Linear(in_features=hidden, out_features=width, bias=bias, dtype=dtype)

    def expand(self, ops: Ops, x: Value) -> Value:
        return ops.inline("down", self.down, self.expand_inner(ops, x))

    def expand_inner(self, ops: Ops, x: Value) -> Value:
        """What `inner` computes, in ops."""
        up = ops.inline("up", self.up, x)
        if self.gated:
            return ops("gate", ops("activate", ops.inline("gate", self.gate, x), form=self.activation), up)
        return ops("activate", up, form=self.activation)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.inner(x))
        return out

    def inner(self, x: Tensor) -> Tensor:
        """x [..., width] -> what `down` reads [..., hidden]."""
        act = ACTIVATIONS[self.activation]
        y: Tensor = act(self.gate(x)) * self.up(x) if self.gated else act(self.up(x))
        return y
