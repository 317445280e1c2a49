"""Scaling and shifting of channels, moved into a convolution or linear.

Shapes: a linear's W [o, i]; a convolution's W [o, i / g, k...] in g groups, transposed [i, o / g, k...].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Channels:
    """y_c = scale_c x_c + shift_c, float64 [C]."""

    scale: Tensor
    shift: Tensor


def statistics(norm: Any) -> Channels:
    """What a batch norm multiplies each channel by and adds to it, float64 [C]."""
    mean, variance = norm.running_mean.detach().double(), norm.running_var.detach().double()
    scale = 1 / (variance + norm.eps).sqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -mean * scale
    return Channels(scale, shift if norm.bias is None else shift + norm.bias.detach().double())


def into_outputs(layer: Any, channels: Channels) -> tuple[Tensor, Tensor]:
    """Weight and bias of the layer whose outputs are scaled and shifted, in the layer's dtype."""
    wide = layer.weight.detach().double()
    if getattr(layer, "transposed", False):
        scale = channels.scale.view(layer.groups, 1, -1, *[1] * (wide.ndim - 2))
        weight = (wide.view(layer.groups, -1, *wide.shape[1:]) * scale).view_as(wide)
    else:
        weight = wide * channels.scale.view(-1, *[1] * (wide.ndim - 1))
    before = 0 if layer.bias is None else layer.bias.detach().double()
    bias = before * channels.scale + channels.shift
    return weight.to(layer.weight.dtype), bias.to(layer.weight.dtype)


def into_inputs(layer: Any, channels: Channels) -> tuple[Tensor, Tensor]:
    """Weight and bias of the layer whose inputs are scaled and shifted. Every output must see all inputs:
    a convolution that pads with zeros does not, unless the shift is zero.
    """
    wide = layer.weight.detach().double()
    groups = getattr(layer, "groups", 1)
    parts = wide.reshape(groups, wide.shape[0] // groups, wide.shape[1], -1)
    scale, shift = (t.view(groups, 1, -1, 1) for t in (channels.scale, channels.shift))
    bias = (parts * shift).sum((2, 3)).flatten()
    if layer.bias is not None:
        bias = bias + layer.bias.detach().double()
    weight = (parts * scale).view_as(wide)
    return weight.to(layer.weight.dtype), bias.to(layer.weight.dtype)
