"""The definition of norm in plain torch, in the precision of x."""

from __future__ import annotations

import torch
from torch import Tensor

from effc.kernels.norm.spec import NormSpec


def reference(spec: NormSpec, x: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [M, D], gain [D], bias [D] or None -> y [M, D], all of one dtype."""
    centered = x - x.mean(-1, keepdim=True) if spec.form == "layer" else x
    n = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + spec.eps)
    y = n * (gain + spec.offset)
    return y if bias is None else y + bias
