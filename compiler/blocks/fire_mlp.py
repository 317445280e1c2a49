"""FireMLP: a feed-forward block of which each token uses the channels that a predictor says will fire.

Shapes: n tokens, d width, f channels, r rank of the predictor. Source: Fire Together Wire Together, arXiv
2110.08232, section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from effc.compiler.blocks.linear import Linear
from effc.compiler.blocks.mlp import ACTIVATIONS, MLP, Activation
from effc.compiler.blocks.unit import Unit
from effc.compiler.ops_adaptive import fires

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value


class FireMLP(MLP):
    """y = down(a * (z > 0)), a = act(gate x) * up x (or act(up x)), z = predictor(x) [n, f].

    The predictor is a linear, of rank r in two where `rank` is not 0. One token at a time reads the rows of
    channels that fire and no other; several are masked. In training the mask has the gradient of sigmoid(z),
    and `told` keeps z and the channels that should fire. `detached`: the predictor sends no gradient to what
    lies before it.
    """

    def __init__(
        self,
        *,
        width: int,
        hidden: int,
        mass: float = 0.92,
        rank: int = 0,
        detached: bool = True,
        activation: Activation = "silu",
        gated: bool = True,
        bias: bool = False,
        dtype: str = "float32",
    ) -> None:
        super().__init__(
            width=width, hidden=hidden, activation=activation, gated=gated, bias=bias, dtype=dtype
        )
        self.mass = mass
        self.rank = rank
        self.detached = detached
        self.told: list[tuple[Tensor, Tensor]] = []
        if rank:
            self.fire_in = Linear(in_features=width, out_features=rank, dtype=dtype)
        self.fire_out = Linear(in_features=rank or width, out_features=hidden, bias=True, dtype=dtype)

    def channel_flops(self) -> int:
        """Of one channel that fires, for one token."""
        return 2 * self.width * (3 if self.gated else 2)

    def predicted(self, x: Tensor) -> Tensor:
        """x [..., d] -> z [..., f]; above 0 where a channel shall fire."""
        z: Tensor = self.fire_out(self.fire_in(x) if self.rank else x)
        return z

    def expand(self, ops: Ops, x: Value) -> Value:
        inner = self.expand_inner(ops, x)
        low = ops.inline("fire_in", self.fire_in, x) if self.rank else x
        live = ops("fires", ops.inline("fire_out", self.fire_out, low))
        return ops.inline("down", self.down, ops("gate", inner, live))

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta:
            return torch.zeros_like(x)
        if self.training:
            return self._trained(x)
        z = self.predicted(x)
        leaves: list[Unit] = [self.up, self.down, *((self.gate,) if self.gated else ())]
        if x.numel() == self.width and all(type(leaf) is Linear for leaf in leaves):
            return self._one(x.reshape(-1), z.reshape(-1) > 0).view_as(x)
        out: Tensor = self.down(self.inner(x) * fires(z))
        return out

    def _one(self, x: Tensor, live: Tensor) -> Tensor:
        """x [d] -> [d], by the channels [f] that fire alone."""
        rows = live.nonzero()[:, 0]
        act = ACTIVATIONS[self.activation]
        up = _some(self.up, rows, x)
        inner = act(_some(self.gate, rows, x)) * up if self.gated else act(up)
        bias = self.down.bias
        return F.linear(inner, self.down.weight[:, rows], bias if isinstance(bias, Tensor) else None)

    def _trained(self, x: Tensor) -> Tensor:
        inner, z = self.inner(x), self.predicted(x.detach() if self.detached else x)
        self.told.append((z, should_fire(inner.detach(), self.mass)))
        soft = torch.sigmoid(z)
        out: Tensor = self.down(inner * (fires(z) + soft - soft.detach()))
        return out


def should_fire(a: Tensor, mass: float) -> Tensor:
    """a [..., f] -> bool [..., f]: the largest |a|, until together they have more than `mass` of their sum.

    A mass of 1 keeps all that are not zero.
    """
    size = a.abs().float()
    share = size / size.sum(-1, keepdim=True).clamp(min=1e-30)
    ranked, order = share.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(-1) - ranked
    keep = (before <= mass) & (ranked > 0) if mass < 1 else ranked > 0
    return torch.zeros_like(keep).scatter(-1, order, keep)


def _some(linear: Linear, rows: Tensor, x: Tensor) -> Tensor:
    """x [i] through the rows of a linear -> [k]."""
    bias = linear.bias
    return F.linear(x, linear.weight[rows], bias[rows] if isinstance(bias, Tensor) else None)
