"""The GPTQ solver: round column after column, and let the columns not yet rounded make up for the error.

Shapes: W [R, i], H [i, i] = 2 E[x x^T] over inputs x [i], U [i, i] upper triangular with inv(H) = U^T U.
Work is done on W^T, where a column of W is a contiguous row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effc.passes.quantize._grid import Find, decode, encode

STRIP = 512
"""Columns that are copied or looked at together, where a copy of the whole would be one too many."""


def factor(c: Tensor, damp: float, order: Tensor | None = None) -> tuple[Tensor, float] | None:
    """U of inv(H + d mean(diag H) I), and the d that worked: `damp`, or ten times more up to 0.1; else None.

    H = 2 c, with `order` its rows and columns in that order; `c` stays as it is. A zero on the
    diagonal, an input that never fires, counts as 1. One matrix of the size of c is all the memory it takes.
    """
    work = torch.empty_like(c).mT  # columns lie together, as LAPACK wants them to work in place
    failed = torch.empty((), dtype=torch.int32)
    while True:
        _twice(c, order, work)
        diagonal = work.diagonal()
        diagonal.add_(diagonal == 0)
        diagonal.add_(damp * float(diagonal.mean()))
        torch.linalg.cholesky_ex(work, out=(work, failed))
        if not failed:
            torch.cholesky_inverse(work, out=work)
            torch.linalg.cholesky_ex(work, upper=True, out=(work, failed))
            if not failed and all(bool(torch.isfinite(part).all()) for part in work.mT.split(STRIP)):
                return work, damp
        if damp >= 0.1:
            return None
        damp = min(0.1, damp * 10)


def _twice(c: Tensor, order: Tensor | None, work: Tensor) -> None:
    """Fill `work` with 2 c, ordered, a strip at a time."""
    for start in range(0, len(c), STRIP):
        strip = slice(start, start + STRIP)
        work[:, strip] = c[:, strip] if order is None else c[:, order[strip]][order]
    work.mul_(2)


def solve(
    w: Tensor,
    u: Tensor,
    bits: int,
    group: int,
    symmetric: bool,
    store: torch.dtype,
    block: int,
    order: Tensor | None,
    find: Find,
) -> tuple[Tensor, Tensor, Tensor]:
    """w [R, i] float32 -> codes [R, i], scale [R, G], zero [R, G], all float32; `group` inputs share a scale
    that `find` fits.

    For column j: q_j = round(w_j), e = (w_j - q_j) / U_jj, W[:, j:] -= e U[j, j:]. A group's grid is fitted
    when its first column is reached. With `order`, a permutation of the columns that U is in too, columns are
    rounded in that order and every grid is fitted beforehand, so no index is stored.
    """
    rows, inputs = w.shape
    scale, zero = find(w.view(rows, -1, group), bits, symmetric, store)
    wt = w.T.contiguous() if order is None else w.T[order]
    qt = torch.empty_like(wt)
    home = torch.arange(inputs) if order is None else order
    groups = (home // group).tolist()
    step = aligned(block, group)
    for start in range(0, inputs, step):
        end = min(start + step, inputs)
        here, spread = wt[start:end], torch.empty(end - start, rows)
        for j in range(end - start):
            at = groups[start + j]
            if order is None and (start + j) % group == 0:
                part = wt[start + j : start + j + group].T.contiguous().unsqueeze(1)
                scale[:, at : at + 1], zero[:, at : at + 1] = find(part, bits, symmetric, store)
            column, s, z = here[j].unsqueeze(1), scale[:, at], zero[:, at]
            q = encode(column, s, z, bits)
            qt[start + j] = q.squeeze(1)
            spread[j] = (here[j] - decode(q, s, z).squeeze(1)) / u[start + j, start + j]
            here[j + 1 :].addr_(u[start + j, start + j + 1 : end], spread[j], alpha=-1)
        wt[end:].addmm_(u[start:end, end:].T, spread, alpha=-1)
    if order is not None:
        qt = qt[order.argsort()]
    return qt.T.contiguous(), scale, zero


def aligned(block: int, group: int) -> int:
    """Columns worked on at once, near `block`, so that a group starts where all updates have arrived."""
    if group <= block:
        return group * (block // group)
    return max(d for d in range(1, block + 1) if group % d == 0)


def output_error(w: Tensor, rounded: Tensor, h: Tensor) -> float:
    """||(W - W') X|| / ||W X|| over the inputs that made H, or any multiple of it."""
    return relative([squares(w, rounded, h)])


def squares(w: Tensor, rounded: Tensor, h: Tensor) -> tuple[float, float]:
    """||(W - W') X||^2 and ||W X||^2 up to one factor, which add up over rows of W."""
    gap = w - rounded
    lost = float((gap @ h).mul_(gap).sum(dtype=torch.float64))
    return lost, float((w @ h).mul_(w).sum(dtype=torch.float64))


def relative(rows: Sequence[tuple[float, float]]) -> float:
    """The relative error that `squares` of all rows make."""
    lost, kept = (sum(part) for part in zip(*rows, strict=True))
    return float((max(lost, 0.0) / kept) ** 0.5) if kept > 0 else 0.0
