"""A layer that lets the samples of a training batch look at each other.

Shapes: features x [N, C] of N samples; in training [2 N, C] come out: x, then what the layer makes of x.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SampleMixer(nn.Module):
    """In training x and encoder(x) below each other, the batch being the sequence; at rest x itself."""

    def __init__(self, width: int, heads: int, ff: int, dropout: float) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(width, heads, ff, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Raises ValueError in training, when there is one sample or x is no matrix."""
        if not self.training:
            return x
        if x.ndim != 2 or x.shape[0] < 2:
            raise ValueError(f"features [N, C] of at least two samples are due, not {list(x.shape)}")
        mixed: Tensor = self.encoder(x[:, None, :])[:, 0, :]
        return torch.cat((x, mixed))
