"""A batch norm with estimated statistics, and a norm over groups of channels behind it.

Shapes: x [B, C, ...], statistics, gains and shifts [C].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BatchChannelNorm(nn.Module):
    """y = group_norm(g (x - m) / sqrt(v + eps) + b), with m and v estimates that follow the batches slowly.

    In training m moves by `rate` towards each batch's mean before it is used, and v towards its variance; no
    gradient flows through them. At rest they stay, so that each sample is by itself.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, groups: int, rate: float, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.channels, self.groups, self.rate, self.eps = channels, groups, rate, eps
        self.weight = nn.Parameter(torch.ones(channels, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(channels, dtype=dtype))
        self.norm = nn.GroupNorm(groups, channels, eps=eps, dtype=dtype)
        self.register_buffer("running_mean", torch.zeros(channels, dtype=dtype))
        self.register_buffer("running_var", torch.ones(channels, dtype=dtype))

    @classmethod
    def of(cls, norm: Any, groups: int, rate: float) -> BatchChannelNorm:
        """In place of a batch norm: its statistics, gain and shift, and groups that change nothing yet but
        normalize.
        """
        like: Tensor = norm.running_mean
        made = cls(norm.num_features, groups, rate, norm.eps, like.dtype).to(like.device)
        made.running_mean, made.running_var = norm.running_mean, norm.running_var
        if norm.weight is not None:
            made.weight, made.bias = norm.weight, norm.bias
        return made.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            axes = [0, *range(2, x.ndim)]
            with torch.no_grad():
                mean, variance = x.mean(axes), x.var(axes, unbiased=False)
                self.running_mean = torch.lerp(self.running_mean, mean, self.rate)
                self.running_var = torch.lerp(self.running_var, variance, self.rate)
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        out: Tensor = self.norm(y)
        return out

    def extra_repr(self) -> str:
        return f"{self.channels}, groups={self.groups}, rate={self.rate}, eps={self.eps}"
