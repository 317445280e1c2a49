"""Weights and biases put in place together: a layer without a bias becomes one with a bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from effc.compiler.blocks.linear import Linear
from effc.compiler.rewrite import Rewriter
from effc.compiler.sharing import cloned


def put_affine(rw: Rewriter, path: str, weight: Tensor | None, bias: Tensor | None, detail: str) -> None:
    """Write a weight and, where one is given, a bias; None leaves that tensor as it is."""
    if bias is not None and rw.module(path).bias is None:
        add_bias(rw, path, weight, bias, detail)
        return
    if weight is not None:
        rw.write(path, "weight", weight, detail)
    if bias is not None:
        rw.write(path, "bias", bias, detail)


def add_bias(rw: Rewriter, path: str, weight: Tensor | None, bias: Tensor | None, detail: str) -> None:
    """The same linear or convolution with a bias; without numbers where they are not given."""
    old = rw.module(path)
    dtype = str(old.weight.dtype).removeprefix("torch.")
    outputs = old.out_features if hasattr(old, "out_features") else old.out_channels
    if isinstance(old, Linear):
        new: Any = Linear(in_features=old.in_features, out_features=outputs, bias=True, dtype=dtype)
    else:
        new = cloned(old, {})
    added = bias if bias is not None else torch.empty(outputs, dtype=old.weight.dtype, device="meta")
    new.weight = old.weight if weight is None else nn.Parameter(weight, requires_grad=False)
    new.bias = nn.Parameter(added, requires_grad=False)
    rw.swap(path, new, detail)
