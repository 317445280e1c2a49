"""The solver of shift-add weights: sums of signs times scales, closest to weights or to what they put out.

Shapes: groups w [G, n] that share P scales; a [G, P] descending, signs [G, P, n]; W [R, i], U [i, i] upper
triangular with inv(H) = U^T U (passes/quantize/_solve.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from effc.compiler.planes import LEAST, MOST, NONE, scale_values

Scale = Literal["pow2", "apot2", "fp16"]


@dataclass(frozen=True, slots=True)
class Form:
    """How one matrix [R, i] is written."""

    planes: int
    down: int
    """Rows that share scales."""
    across: int
    """Columns that share scales."""
    scale: Scale
    terms: int
    rounds: int


def stored(a: Tensor, scale: Scale, terms: int) -> Tensor:
    """Scales a [...] >= 0 as they are stored [terms, ...]: exponents, or half precision.

    pow2: 2^round(log2 a). apot2: powers below what is left, one after another, the last one the nearest.
    """
    if scale == "fp16":
        return a.clamp(max=65504.0).to(torch.float16).unsqueeze(0)
    if terms == 1:
        return _exponent(a.log2().round(), a).unsqueeze(0)
    left, found = a.contiguous(), []
    for term in range(terms):
        low = left.log2().floor()
        if term == terms - 1:
            low = torch.where(left > 1.5 * torch.exp2(low), low + 1, low)
        exponent = _exponent(low, left)
        found.append(exponent)
        left = (left - scale_values(exponent.view(1, 1, 1, -1)).view_as(left)).clamp(min=0)
    return torch.stack(found)


def _exponent(e: Tensor, of: Tensor) -> Tensor:
    return torch.where(of > 0, e.clamp(LEAST, MOST), float(NONE)).to(torch.int8)


def as_stored(a: Tensor, form: Form) -> Tensor:
    """a [G, P] as it comes back from storage, float32"""
    kept = stored(a.T.reshape(-1), form.scale, form.terms)
    return scale_values(kept.view(1, kept.shape[0], 1, -1)).view(a.shape[1], a.shape[0]).T.contiguous()


def greedy(w: Tensor, planes: int) -> tuple[Tensor, Tensor]:
    """w [G, n] -> a [G, P], signs [G, P, n]: each plane is the signs of what is left, times its mean size."""
    left, scales, signs = w.clone(), [], []
    for _ in range(planes):
        b = torch.where(left < 0, -1.0, 1.0)
        a = left.abs().mean(1)
        left = left - a[:, None] * b
        scales.append(a)
        signs.append(b)
    return torch.stack(scales, 1), torch.stack(signs, 1)


def assign(w: Tensor, a: Tensor) -> Tensor:
    """w [G, n], a [G, P] -> signs [G, P, n] of the nearest of the 2^P sums of each number"""
    patterns = torch.tensor(list(product((-1.0, 1.0), repeat=a.shape[1])))
    sums, order = (a @ patterns.T).sort(1)
    middles = (sums[:, 1:] + sums[:, :-1]) / 2
    nearest = torch.searchsorted(middles.contiguous(), w.contiguous())
    return patterns[order.gather(1, nearest)].transpose(1, 2)


def fit(w: Tensor, form: Form) -> tuple[Tensor, float]:
    """w [G, n] -> scales a [G, P] as stored, and the squared error with the nearest signs.

    From the greedy start, by turns: a the least squares of w on the signs, its sizes in descending order;
    signs the nearest. The best of all rounds after rounding to what is stored is kept.
    """
    a, signs = greedy(w, form.planes)
    best, least = as_stored(a, form), torch.full((len(w),), torch.inf)
    least = _squares(w, best)
    for _ in range(form.rounds):
        moved = _least_squares(w, signs).abs().sort(1, descending=True).values
        signs = assign(w, moved)
        kept = as_stored(moved, form)
        error = _squares(w, kept)
        best, least = torch.where((error < least)[:, None], kept, best), torch.minimum(error, least)
        if torch.equal(moved, a):
            break
        a = moved
    return best, float(least.sum())


def _least_squares(w: Tensor, signs: Tensor) -> Tensor:
    """a [G, P] = (B B^T)^-1 B w; planes that are alike share, by a ridge"""
    gram = signs @ signs.transpose(1, 2)
    gram.diagonal(dim1=1, dim2=2).add_(1e-4 * signs.shape[2])
    solved: Tensor = torch.linalg.solve(gram, (signs @ w.unsqueeze(2))).squeeze(2)
    return solved


def _squares(w: Tensor, a: Tensor) -> Tensor:
    """The squared error of each group [G] with the nearest signs"""
    return (w - (a.unsqueeze(2) * assign(w, a)).sum(1)).square().sum(1)


def solve(w: Tensor, u: Tensor | None, form: Form, order: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """w [R, i] -> signs [P, R, i], scales [P, t, A, B] as stored, and W' [R, i].

    Without u each group is fitted by itself. With it, column after column: the nearest signs, then the error
    over U_jj goes into the columns still to come; scales of a group are fitted when its first column is
    reached, or all beforehand where `order`, a permutation that u is in too, takes columns out of turn.
    """
    rows, columns = w.shape
    runs, beside = rows // form.down, columns // form.across
    scales = torch.empty(form.planes, max(1, form.terms), runs, beside)
    signs = torch.empty(form.planes, rows, columns)
    live, out = w.clone(), torch.empty_like(w)
    ahead = u is None or (order is not None and form.across > 1)

    def settle(run: int) -> None:
        """Fit the scales of one run of columns."""
        part = live[:, run * form.across : (run + 1) * form.across]
        a, _ = fit(part.reshape(runs, -1), form)
        scales[..., run] = stored(a.T, form.scale, form.terms).transpose(0, 1).float()

    if ahead:
        for run in range(beside):
            settle(run)
    turn = list(range(columns)) if order is None else order.tolist()
    kind = torch.float16 if form.scale == "fp16" else torch.int8
    for at, j in enumerate(turn):
        run = j // form.across
        if not ahead and (form.across == 1 or j % form.across == 0):
            settle(run)
        a = scale_values(scales[..., run : run + 1].to(kind)).squeeze(2).T  # [A, P]
        signs[:, :, j] = assign(live[:, j].view(runs, -1), a).transpose(0, 1).flatten(1)
        out[:, j] = (a.repeat_interleave(form.down, 0).T * signs[:, :, j]).sum(0)
        if u is not None:
            e = (live[:, j] - out[:, j]) / u[at, at]
            later = turn[at + 1 :]
            if order is None:
                live[:, j + 1 :].addr_(e, u[at, at + 1 :], alpha=-1)
            else:
                live[:, later] -= e[:, None] * u[at, at + 1 :]
    return signs, scales.to(kind), out


def score(w: Tensor, u: Tensor) -> float:
    """How much a matrix suffers from few bits: ||V||_F std(V)^2 of V = |W| / diag U, per root of its size."""
    v = w / u.diagonal()
    return float(v.norm()) * float(v.std()) ** 2 / math.sqrt(w.numel())
