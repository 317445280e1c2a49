"""Weights of a linear whose inputs are rounded: to nearest, or so that its outputs stay.

Shapes: W [o, i], x [n, i] inputs, x' [n, i] as their codes have them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effc.passes.quantize._grid import decode, fit_least_squares
from effc.passes.quantize._solve import factor, solve
from effc.passes.quantize._uniform import nearest

STORE = torch.float16
BLOCK = 128
"""Columns whose updates are applied together."""
JUDGED = 4
"""Every so manieth row of the sample judges what was fitted on the others."""


@dataclass(frozen=True, slots=True)
class Rounded:
    """Codes [o, i] int8, scale and zero point [o, 1] of the rows, and ||x' W'^T - x W^T|| / ||x W^T||."""

    q: Tensor
    scale: Tensor
    zero: Tensor
    error: float

    def dense(self) -> Tensor:
        """W' float32 [o, i]"""
        return decode(self.q.float().unsqueeze(1), self.scale, self.zero).squeeze(1)


def to_nearest(w: Tensor, x: Tensor, coded: Tensor, bits: int) -> Rounded:
    """Every row on the asymmetric grid with the least squared error of its weights."""
    q, scale, zero, _ = nearest(w.float(), bits, 1, False, STORE, fit_least_squares)
    return _judged(w, x, coded, q, scale, zero)


def rebuilt(w: Tensor, x: Tensor, coded: Tensor, bits: int, damp: float) -> Rounded:
    """Weights fitted to rounded inputs, then rounded column by column; to nearest where that is no better.

    W* = W (x^T x') (x'^T x' + d I)^-1 makes up for the rounding of inputs, and each column of W* for that of
    the columns before it, with the inverse of x'^T x' (GPTQ). Three of four rows fit, the fourth judges.
    The source does not say how it rebuilds weights; this closed form is ours.
    """
    plain = to_nearest(w, x, coded, bits)
    judges = torch.arange(len(x)) % JUDGED == 0
    seen, held = ~judges, judges
    if int(seen.sum()) < 2 or not bool(held.any()):
        return plain
    near, far = coded[seen].float(), x[seen].float()
    c = near.T @ near / len(near)
    root = factor(c, damp)
    if root is None:
        return plain
    ridge = c.double()
    ridge.diagonal().add_(damp * ridge.diagonal().mean().clamp(min=1e-12))
    mixed = ((near - far).T @ near / len(near)).double()  # [i, i]: (x' - x)^T x'
    change = torch.linalg.solve(ridge, (w.double() @ mixed).T).T  # the ridge keeps it regular
    target = (w.double() - change).float().masked_fill(c.diagonal() == 0, 0.0).contiguous()
    q, scale, zero = solve(target, root[0], bits, w.shape[1], False, STORE, BLOCK, None, fit_least_squares)
    fitted = _judged(w, x, coded, q.to(torch.int8), scale, zero)
    apart = [_lost(w, x[held], coded[held], one.dense()) for one in (plain, fitted)]
    return fitted if apart[1] < apart[0] else plain


def _judged(w: Tensor, x: Tensor, coded: Tensor, q: Tensor, scale: Tensor, zero: Tensor) -> Rounded:
    one = Rounded(q, scale, zero, 0.0)
    whole = float((x.float() @ w.float().T).square().sum())
    lost = _lost(w, x, coded, one.dense())
    return Rounded(q, scale, zero, (lost / whole) ** 0.5 if whole > 0 else 0.0)


def _lost(w: Tensor, x: Tensor, coded: Tensor, rounded: Tensor) -> float:
    return float((coded.float() @ rounded.T - x.float() @ w.float().T).square().sum())
