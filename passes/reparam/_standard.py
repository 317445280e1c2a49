"""Convolutions that run with standardized weights: each filter with mean zero and deviation one.

Shapes: a convolution's W [o, i / g, k...]; a filter is W[o], its fan-in i / g times the product of k.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

Form = Literal["variance", "deviation"]


def standardized(weight: Tensor, eps: float, form: Form) -> Tensor:
    """(W_o - mean W_o) / sqrt(var W_o + eps), or / (std W_o + eps); gradients flow through the statistics."""
    axes = tuple(range(1, weight.ndim))
    centered = weight - weight.mean(axes, keepdim=True)
    variance = centered.square().mean(axes, keepdim=True)
    return centered / ((variance + eps).sqrt() if form == "variance" else variance.sqrt() + eps)


class StandardConv(nn.Module):
    """A convolution whose weight is standardized on every call."""

    def __init__(self, conv: nn.modules.conv._ConvNd, eps: float, form: Form) -> None:
        super().__init__()
        self.conv, self.eps = conv, eps
        self.form: Form = form

    @property
    def weight(self) -> Tensor:
        """The standardized weight."""
        return standardized(self.conv.weight, self.eps, self.form)

    def forward(self, x: Tensor) -> Tensor:
        run: Any = self.conv._conv_forward
        out: Tensor = run(x, self.weight, self.conv.bias)
        return out

    def extra_repr(self) -> str:
        return f"eps={self.eps}, form={self.form}"
