"""One grid for a layer in place of one for each channel: the norm and its readers take up the difference.

A channel of a norm's output y_c = g_c n_c + b_c has a grid (s_c, z_c). With S = mean s, Z = round(mean z),
r = s / S and t = s (z - Z), the norm gives (y + t) / r instead, whose codes on (S, Z) are those of y on
(s, z): g' = g / r, b' = (b + t) / r. What reads it multiplies by W diag(r) and adds b - W t.
Source: RepQuant, arXiv 2402.05628, section on scale reparameterization; shapes: all [d].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effc.compiler.rewrite import Rewriter
from effc.passes.reparam._affine import add_bias, put_affine


@dataclass(frozen=True, slots=True)
class OneGrid:
    """The grid of a layer, and what makes it out of those of its channels."""

    scale: Tensor
    """S [1] float32, as stored"""
    zero: Tensor
    """Z [1] float32, a whole number that is a code"""
    ratio: Tensor
    """r [d] float64"""
    shift: Tensor | None
    """t [d] float64; None where all zero points are 0"""

    def turned(self, y: Tensor) -> Tensor:
        """What the norm gives afterwards in place of y [n, d], float32."""
        wide = y.double() if self.shift is None else y.double() + self.shift
        return (wide / self.ratio).float()


def one_grid(scale: Tensor, zero: Tensor, bits: int, symmetric: bool) -> OneGrid:
    """Of the grids of all channels. Z is rounded, and kept among the codes: a float would move codes."""
    half = 1 << (bits - 1)
    mean = scale.double().mean().float().reshape(1)
    wide = scale.double()
    ratio = wide / mean.double()
    if symmetric:
        return OneGrid(mean, torch.zeros(1), ratio, None)
    middle = torch.round(zero.double().mean()).clamp(-half, half - 1)
    return OneGrid(mean, middle.float().reshape(1), ratio, wide * (zero.double() - middle))


def into_norm(rw: Rewriter, path: str, one: OneGrid) -> None:
    """Give the norm the gain and the bias that turn its output."""
    norm = rw.present(path)
    gain = (norm.weight.detach().double() + norm.offset) / one.ratio
    rw.write(path, "weight", (gain - norm.offset).to(norm.weight.dtype), "channels on one scale")
    if one.shift is not None:
        bias = (norm.bias.detach().double() + one.shift) / one.ratio
        rw.write(path, "bias", bias.to(norm.bias.dtype), "channels on one zero point")


def reader(unit: Any, one: OneGrid) -> tuple[Tensor, Tensor | None]:
    """Weight [o, d] and bias [o], float64, of a linear that reads the turned norm; None: still no bias."""
    wide = unit.weight.detach().double()
    bias = None if unit.bias is None else unit.bias.detach().double()
    if one.shift is not None:
        bias = (0 if bias is None else bias) - wide @ one.shift
    return wide * one.ratio, bias


def into_readers(rw: Rewriter, paths: Sequence[str], one: OneGrid) -> None:
    """Change readers that stay as they are otherwise."""
    for path in paths:
        unit = rw.present(path)
        weight, bias = reader(unit, one)
        dtype = unit.weight.dtype
        put_affine(rw, path, weight.to(dtype), None if bias is None else bias.to(dtype), "reads one grid")


def outline_readers(rw: Rewriter, paths: Sequence[str]) -> None:
    """The structure that `into_readers` leaves where zero points move: a bias everywhere."""
    for path in paths:
        if rw.module(path).bias is None:
            add_bias(rw, path, None, None, "reads one grid")
