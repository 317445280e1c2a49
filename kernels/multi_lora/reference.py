"""The definition of multi_lora in plain torch, in double precision."""

from __future__ import annotations

import torch
from torch import Tensor

from effc.kernels.multi_lora.layout import Adapters, pack


def reference(x: Tensor, adapters: Adapters, index: Tensor, base: Tensor) -> Tensor:
    """x [M, K], index [M] (the number of adapters for none), base [M, N] -> y [M, N] float64."""
    y = base.double().clone()
    edges = adapters.first.tolist()
    for i, scale in enumerate(adapters.scales.tolist()):
        a, b = (t[edges[i] : edges[i + 1]].double() for t in (adapters.a, adapters.b))
        rows = index == i
        y[rows] += scale * (x[rows].double() @ a.t()) @ b
    return y


def example(
    ranks: tuple[int, ...], m: int, k: int, n: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Adapters, Tensor, Tensor]:
    """Random x [M, K], adapters of these ranks, an adapter for each row (some have none), base [M, N]."""
    dice = torch.Generator().manual_seed(seed)
    factors = [
        (
            (torch.randn(r, k, generator=dice) / k**0.5).to(dtype),
            (torch.randn(n, r, generator=dice) / max(1, r) ** 0.5).to(dtype),
            0.5 + i,
        )
        for i, r in enumerate(ranks)
    ]
    x, base = (torch.randn(m, width, generator=dice).to(dtype) for width in (k, n))
    return x, pack(factors), torch.randint(0, len(ranks) + 1, (m,), generator=dice), base
