"""The definition in plain torch, with the kernel's rounding points: bytes of x, exact sums, then float32."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from effc.kernels.epilogue import apply
from effc.kernels.quant_linear.spec import QuantLinearSpec


def quantize_rows(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """x [M, K] float32 -> signed bytes [M, K] int8 and scales [M, G], 127 steps to the largest magnitude."""
    wide = x.view(x.shape[0], groups, -1)
    most = wide.abs().amax(-1, keepdim=True)
    inverse = torch.where(most > 0, 127.0 / most, torch.zeros_like(most))
    return (wide * inverse).round().to(torch.int8).view_as(x), (most * (1 / 127.0)).squeeze(-1)


def sums(spec: QuantLinearSpec, xq: Tensor, codes: Tensor, zeros: Tensor | None) -> Tensor:
    """xq [M, K] int8, codes [N, K] -> exact sums in each group of xq (code - zero code) [M, N, G] int64."""
    groups = spec.groups(codes.shape[1])
    a = xq.long().view(xq.shape[0], 1, groups, -1)
    w = codes.long().view(1, codes.shape[0], groups, -1)
    base = torch.full((1, 1, 1, 1), spec.mid) if zeros is None else zeros.long().unsqueeze(0).unsqueeze(-1)
    return (a * (w - base)).sum(-1)


def reference(
    spec: QuantLinearSpec,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    given: Mapping[str, Tensor],
) -> Tensor:
    """x [M, K] float32, codes [N, K] uint8, scales [N, G], zeros [N, G] uint8 -> y [M, N] (N / 2 paired)."""
    xq, row = quantize_rows(x, spec.groups(x.shape[1]))
    exact = sums(spec, xq, codes, zeros).float()
    y = (exact * (scales.float().unsqueeze(0) * row.unsqueeze(1))).sum(-1)
    if not spec.paired:
        return apply(spec.epilogue, y, given)
    half = y.shape[1] // 2
    first = apply(spec.epilogue[:1], y[:, :half], given)
    return apply(spec.epilogue[1:], first * y[:, half:], given)
