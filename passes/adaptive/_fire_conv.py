"""Convolutions of which each image uses the channels that a predictor says will fire: the three modules.

Shapes: x [B, C, ...], y [B, K, ...], z [B, K], C channels of the input, K of the output, p side of the pooled
input, r rank of the predictor, n the number of axes behind the channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effc.compiler.blocks.fire_mlp import should_fire
from effc.compiler.blocks.linear import Linear
from effc.compiler.ops_adaptive import fires

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_RUN: dict[type[nn.Module], Any] = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
_POOL: dict[int, Any] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


class Predictor(nn.Module):
    """z = W pool(x) + b: above 0 where a channel of what a convolution makes of x shall fire.

    The input is averaged to p^n places of every channel, a softmax over which is taken where `softmax` is
    set. W has rank r where `rank` is not 0. `detached`: no gradient goes to what lies before.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        axes: int,
        pool: int = 1,
        rank: int = 0,
        softmax: bool = False,
        detached: bool = True,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        self.axes, self.pool, self.rank, self.softmax, self.detached = axes, pool, rank, softmax, detached
        inputs = channels * pool**axes
        if rank:
            self.fire_in = Linear(in_features=inputs, out_features=rank, dtype=dtype)
        self.fire_out = Linear(in_features=rank or inputs, out_features=outputs, bias=True, dtype=dtype)

    def flops(self) -> int:
        """Of one image; the average is not counted."""
        return sum(2 * unit.weight.numel() for unit in self.children() if isinstance(unit, Linear))

    def forward(self, x: Tensor) -> Tensor:
        seen = x.detach() if self.detached else x
        if self.pool == 1:
            seen = seen.mean(tuple(range(2, seen.ndim)))
        else:
            seen = _POOL[self.axes](seen, self.pool).flatten(1)
        seen = seen.softmax(1) if self.softmax else seen
        z: Tensor = self.fire_out(self.fire_in(seen) if self.rank else seen)
        return z

    def extra_repr(self) -> str:
        return f"pool={self.pool}, rank={self.rank}, softmax={self.softmax}, detached={self.detached}"


class FireConv(nn.Module):
    """A convolution that is told which of its channels fire, and which of its input are all zero.

    One image alone, at rest, is convolved with the rows of W that fire and the columns that are not zero, the
    other channels come out as zero; several are convolved whole, and a FireGate behind makes them the same.
    """

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv: Any = conv

    @staticmethod
    def takes(conv: nn.Module) -> bool:
        """Whether rows can be left out: all channels read all, or each its own."""
        if type(conv) not in CONVOLUTIONS:
            return False
        own: Any = conv
        return own.groups == 1 or _by_channel(own)

    def forward(self, x: Tensor, z: Tensor, before: Tensor | None = None) -> Tensor:
        """x [B, C, ...], z [B, K], before [B, C]: above 0 where a channel of x is not all zero."""
        if self.training or len(x) > 1 or x.is_meta:
            out: Tensor = self.conv(x)
            return out
        rows = _live(z)
        weight, shift = self.conv.weight[rows], self.conv.bias
        shift = None if shift is None else shift[rows]
        if self.conv.groups > 1:
            own = self.conv
            run = _RUN[type(own)]
            part = run(x[:, rows], weight, shift, own.stride, own.padding, own.dilation, len(rows))
        else:
            columns = slice(None) if before is None else _live(before)
            part = self.conv._conv_forward(x[:, columns], weight[:, columns], shift)
        whole: Tensor = part.new_zeros(1, z.shape[1], *part.shape[2:])
        whole[:, rows] = part
        return whole

    @property
    def reads_all(self) -> bool:
        """Whether a channel reads every channel of the input."""
        return bool(self.conv.groups == 1)


class FireGate(nn.Module):
    """y, zero where z is not above 0. In training the mask has the gradient of sigmoid(z), and `told` keeps z
    and the channels that should fire: of a_c = max |y_c|, the largest, until they have more than `mass`.
    """

    def __init__(self, mass: float) -> None:
        super().__init__()
        self.mass = mass
        self.told: list[tuple[Tensor, Tensor]] = []

    def due(self, y: Tensor) -> Tensor:
        """y [B, K, ...] -> bool [B, K]"""
        return should_fire(y.detach().flatten(2).abs().amax(2), self.mass)

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        live = fires(z)
        if self.training:
            self.told.append((z, self.due(y)))
            soft = torch.sigmoid(z)
            live = live + soft - soft.detach()
        masked: Tensor = y * live.view(*live.shape, *[1] * (y.ndim - 2))
        return masked

    def extra_repr(self) -> str:
        return f"mass={self.mass}"


def _by_channel(conv: Any) -> bool:
    """Each channel is made of the one at its place alone, with zeros at the border."""
    alone = conv.groups == conv.in_channels == conv.out_channels
    return bool(alone and conv.padding_mode == "zeros")


def _live(z: Tensor) -> Tensor:
    """z [1, K] -> the places above 0; the first where there is none, since there must be one."""
    found = (z[0] > 0).nonzero()[:, 0]
    return found if len(found) else torch.zeros(1, dtype=torch.int64, device=z.device)
