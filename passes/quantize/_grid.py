"""The uniform integer grid: fit scale and zero point of a group, round onto it, read it back.

Shapes: w [R, G, g], R rows, G groups of g neighboring inputs; scale and zero [R, G].
Codes are signed: q and zero lie in [-2^(b-1), 2^(b-1) - 1], so that w' = scale (q - zero); symmetric means
zero = 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Find = Callable[[Tensor, int, bool, torch.dtype], tuple[Tensor, Tensor]]
"""Fits the grid of groups: `fit` or `fit_least_squares`."""

SHRINKS = tuple(1 - k / 20 for k in range(10))
"""Factors on the range that `clip = mse` tries."""


def fit(
    w: Tensor, bits: int, symmetric: bool, store: torch.dtype, shrink: float = 1.0
) -> tuple[Tensor, Tensor]:
    """w [R, G, g] float32 -> scale [R, G] float32, already rounded to `store`, and zero [R, G] float32.

    symmetric: s = max|w| / (2^(b-1) - 1).  asymmetric: s = (max(0, w) - min(0, w)) / (2^b - 1), z =
    round(-min / s). A group of zeros gets scale 1.
    """
    half = 1 << (bits - 1)
    if symmetric:
        span = w.abs().amax(-1) * shrink
        scale = _stored(span / (half - 1), store)
        return scale, torch.zeros_like(scale)
    low = w.amin(-1).clamp(max=0) * shrink
    high = w.amax(-1).clamp(min=0) * shrink
    scale = _stored((high - low) / (2 * half - 1), store)
    return scale, (torch.round(-low / scale) - half).clamp(-half, half - 1)


def fit_least_squares(w: Tensor, bits: int, symmetric: bool, store: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `fit`, with the range of each group shrunk to whichever factor leaves the least squared error."""
    best_scale, best_zero = fit(w, bits, symmetric, store)
    best = _error(w, best_scale, best_zero, bits)
    for shrink in SHRINKS[1:]:
        scale, zero = fit(w, bits, symmetric, store, shrink)
        error = _error(w, scale, zero, bits)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def encode(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Round w [R, G, g] to the nearest codes [R, G, g] float32, half to even."""
    half = 1 << (bits - 1)
    return (torch.round(w / scale.unsqueeze(-1)) + zero.unsqueeze(-1)).clamp(-half, half - 1)


def decode(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The weights that codes [R, G, g] stand for."""
    return (q - zero.unsqueeze(-1)) * scale.unsqueeze(-1)


def _error(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return (decode(encode(w, scale, zero, bits), scale, zero) - w).square().sum(-1)


def _stored(scale: Tensor, store: torch.dtype) -> Tensor:
    """Round to the stored dtype and back, never to zero: fitting must see the scale that is kept."""
    least = 2.0**-24 if store == torch.float16 else torch.finfo(store).smallest_normal
    kept = scale.to(store).float().clamp_min(least)
    return torch.where(scale == 0, torch.ones_like(scale), kept)
