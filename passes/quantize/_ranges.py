"""Ranges of inputs: whole, cut at a percentile, or learned as two factors, and the grids that they make.

Shapes: x [n, K] a sample of inputs; a range is low and high, a grid scale and zero point, each [K] where
every channel has its own and [1] where all share one. Codes are signed, as in coded_linear.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effc.compiler.blocks.coded_attention import Curve, on_curve
from effc.compiler.blocks.coded_linear import on_grid

PERCENTILES = (0.999, 0.9999, 0.99999)
"""Where ranges are cut, on both sides, and the least squared error decides."""
FLAT = 1e-3
"""The least scale of a channel, as a share of the mean: a channel that hardly moves keeps its gain finite."""
NEAR = 2.0**-16
"""The least scale of a channel, as a share of its largest number: below, float32 cannot hold the shift."""
START = 4.0
"""Where the logit of a learned factor begins: 1 / (1 + e^-4) = 0.98 of the range."""


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers that codes reach."""

    low: Tensor
    high: Tensor

    def with_zero(self) -> Range:
        """Stretched to hold zero, so that its zero point is a code."""
        return Range(self.low.clamp(max=0), self.high.clamp(min=0))


def grid(span: Range, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point, float32: s = (high - low) / (2^b - 1), z = round(-low / s) - 2^(b-1); symmetric:
    s = max |x| / (2^(b-1) - 1), z = 0. The zero point of a range without 0 lies beyond the codes.
    """
    half = 1 << (bits - 1)
    largest = torch.maximum(span.low.abs(), span.high.abs())
    scale = largest / (half - 1) if symmetric else (span.high - span.low) / (2 * half - 1)
    scale = torch.maximum(scale, torch.maximum(FLAT * scale.mean(), NEAR * largest))
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.zeros_like(scale) if symmetric else torch.round(-span.low / scale) - half
    return scale, zero


def cut(x: Tensor, whole: Range, bits: int, symmetric: bool) -> Range:
    """The whole range, or one of those between percentiles: the one whose codes are nearest to x [n, K], for
    each channel where it has a range of its own.
    """
    each = len(whole.low) > 1
    wide = x if each else x.reshape(-1, 1)
    best, least = whole, _squares(wide, whole, bits, symmetric)
    ordered = wide.sort(0).values
    for share in PERCENTILES:
        at = round(share * (len(ordered) - 1))
        span = Range(ordered[len(ordered) - 1 - at], ordered[at])
        span = span if each else span.with_zero()
        error = _squares(wide, span, bits, symmetric)
        better = error < least
        best = Range(torch.where(better, span.low, best.low), torch.where(better, span.high, best.high))
        least = torch.where(better, error, least)
    return best


def learned(
    x: Tensor, gram: Tensor, span: Range, bits: int, symmetric: bool, steps: int, rate: float
) -> Range:
    """The range whose two factors make ||(x' - x) W^T|| least: x [n, K], gram = W^T W [K, K] of its readers.

    low = m - a (m - low), high = m + b (high - m) with m the middle of a channel and 0 for a layer, a and b
    sigmoids that Adam moves, the rounding passed straight through; symmetric has one factor, about zero. The
    best range met is kept, the given one among them. The source does not say how factors are written or how
    fast they learn: `steps` and `rate` are ours.
    """
    around_zero = symmetric or len(span.low) == 1
    middle = torch.zeros_like(span.low) if around_zero else (span.low + span.high) / 2
    best, least = span, _lost(x, gram, span, bits, symmetric)
    with torch.enable_grad():
        logits = [torch.full_like(span.low, START).requires_grad_() for _ in range(1 if symmetric else 2)]
        optimizer = torch.optim.Adam(logits, lr=rate)
        for _ in range(steps):
            low, high = torch.sigmoid(logits[0]), torch.sigmoid(logits[-1])
            now = Range(middle - low * (middle - span.low), middle + high * (span.high - middle))
            lost = _lost(x, gram, now, bits, symmetric)
            if float(lost.detach()) < float(least):
                best, least = Range(now.low.detach(), now.high.detach()), lost.detach()
            optimizer.zero_grad()
            lost.backward()
            optimizer.step()
    return best


def curve_size(p: Tensor, largest: float, curve: Curve, bits: int) -> Tensor:
    """D [1] of a curve: the largest probability, or the percentile whose points are nearest to p [n]."""
    ordered = p.flatten().sort().values
    sizes = [torch.tensor([largest])]
    sizes += [ordered[round(share * (len(ordered) - 1))].reshape(1) for share in PERCENTILES]
    tried = [size for size in sizes if float(size) > 0]
    errors = [float((on_curve(ordered, size, curve, bits) - ordered).square().sum()) for size in tried]
    return tried[min(range(len(tried)), key=errors.__getitem__)] if tried else torch.ones(1)


def _squares(x: Tensor, span: Range, bits: int, symmetric: bool) -> Tensor:
    """Squared error of each channel [K]."""
    scale, zero = grid(span, bits, symmetric)
    return (on_grid(x, scale, zero, bits) - x).square().sum(0)


def _lost(x: Tensor, gram: Tensor, span: Range, bits: int, symmetric: bool) -> Tensor:
    """||(x' - x) W^T||^2 / n, with gradients to the range where it asks for them."""
    scale, zero = grid(span, bits, symmetric)
    half = 1 << (bits - 1)
    zero = _straight(zero, -span.low / scale - half) if not symmetric else zero
    q = _straight(torch.round(x / scale), x / scale) + zero
    apart = (q.clamp(-half, half - 1) - zero) * scale - x
    return ((apart @ gram) * apart).sum() / len(x)


def _straight(value: Tensor, like: Tensor) -> Tensor:
    """The value, with the gradient of what it is rounded from."""
    return like + (value - like).detach()
