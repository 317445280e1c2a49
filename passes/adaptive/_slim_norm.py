"""SlimNorm: a batch norm with statistics of its own for each width that a network is trained at.

Shapes: x [B, c, ...] with the first c of C channels, S states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = tuple[float, ...]
"""The widths that the input of a norm depends on: that of the encoder, in a decoder its own too."""
_NORMS: dict[str, type[nn.modules.batchnorm._BatchNorm]] = {
    kind.__name__: kind for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
}
MOMENTUM = 0.1
"""Where a batch norm averages over all batches (momentum = None), which does not suit moving weights."""


class SlimNorm(nn.Module):
    """y = g (x - m_s) / sqrt(v_s + eps) + b with gain g and shift b [C] of all states, m and v [S, C].

    State 0 is the whole network and what a plain call computes. In training the statistics of the batch are
    taken, and `follow` moves those of the state towards them after each step.
    """

    def __init__(self, norm: Any, states: Sequence[State]) -> None:
        """In place of a batch norm; every state begins with its statistics."""
        super().__init__()
        self.of, self.eps, self.states = type(norm).__name__, norm.eps, tuple(states)
        self.momentum = MOMENTUM if norm.momentum is None else norm.momentum
        self.weight, self.bias = norm.weight, norm.bias
        self.mean = nn.Parameter(norm.running_mean.detach().repeat(len(states), 1), requires_grad=False)
        self.variance = nn.Parameter(norm.running_var.detach().repeat(len(states), 1), requires_grad=False)
        self.seen: list[tuple[int, Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.at(x, 0)

    def at(self, x: Tensor, state: int) -> Tensor:
        """The norm in a state."""
        c = x.shape[1]
        mean, variance, weight, shift = self.numbers(state, c)
        if not self.training:
            return F.batch_norm(x, mean, variance, weight, shift, eps=self.eps)
        axes = [0, *range(2, x.ndim)]
        with torch.no_grad():
            self.seen.append((state, x.float().mean(axes), x.float().var(axes)))
        return F.batch_norm(x, None, None, weight, shift, training=True, eps=self.eps)

    def numbers(self, state: int, c: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Mean, variance, gain and shift of the first c channels in a state, each [c]."""
        weight, shift = (None if t is None else t[:c] for t in (self.weight, self.bias))
        return self.mean[state, :c].detach(), self.variance[state, :c].detach(), weight, shift

    def follow(self, path: str, weights: Mapping[str, nn.Parameter]) -> None:
        """Move statistics in `weights`, by name, towards the batches seen since the last call."""
        mean, variance = weights.get(f"{path}.mean"), weights.get(f"{path}.variance")
        seen, self.seen = self.seen, []
        if mean is None or variance is None:
            return
        for state, m, v in seen:
            mean[state, : len(m)].lerp_(m.to(mean.dtype), self.momentum)
            variance[state, : len(v)].lerp_(v.to(variance.dtype), self.momentum)

    def plain(self, state: int, c: int) -> nn.Module:
        """The batch norm of the first c channels in a state."""
        given = {"eps": self.eps, "momentum": self.momentum, "affine": self.weight is not None}
        made: Any = _NORMS[self.of](c, device="meta", dtype=self.mean.dtype, **given)
        mean, variance, weight, shift = self.numbers(state, c)
        made.running_mean, made.running_var = mean.clone(), variance.clone()
        made.num_batches_tracked = torch.zeros((), dtype=torch.int64, device=mean.device)
        if weight is not None and shift is not None:
            made.weight, made.bias = (
                nn.Parameter(t.detach().clone(), requires_grad=False) for t in (weight, shift)
            )
        made.eval()
        out: nn.Module = made
        return out

    def extra_repr(self) -> str:
        return f"{self.mean.shape[1]}, states={self.states}, eps={self.eps}"
