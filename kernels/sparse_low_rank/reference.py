"""The definition in plain torch, at the precision of what it is given; differentiable."""

from __future__ import annotations

from torch import Tensor


def reference(x: Tensor, a: Tensor, b: Tensor, values: Tensor, places: Tensor, factor: float) -> Tensor:
    """x [M, K], A [r, K], B [N, r], values [n] at places [n] of the flattened [N, K] -> y [M, N]."""
    w = (factor * (b @ a)).flatten().index_add(0, places.long(), values).view(b.shape[0], a.shape[1])
    return x @ w.t()
