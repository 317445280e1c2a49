"""The GPTQ solver: round column after column, and let the columns not yet rounded make up for the error.

Shapes: W [R, i], H [i, i] = 2 E[x x^T] over inputs x [i], U [i, i] upper triangular with inv(H) = U^T U.
Work is done on W^T, where a column of W is a contiguous row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effc.passes.quantize._grid import decode, encode, fit


def factor(h: Tensor, damp: float) -> tuple[Tensor, float] | None:
    """U of inv(H + d mean(diag H) I), and the d that worked: `damp`, or ten times more up to 0.1; else None.

    `h` must have no zero on its diagonal.
    """
    mean = float(h.diagonal().mean())
    while True:
        damped = h.clone()
        damped.diagonal().add_(damp * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped  # at most three matrices of this size at once, beside `h`
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            del lower
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed and bool(torch.isfinite(upper).all()):
                return upper, damp
        if damp >= 0.1:
            return None
        damp = min(0.1, damp * 10)


def solve(
    w: Tensor,
    u: Tensor,
    bits: int,
    group: int,
    symmetric: bool,
    store: torch.dtype,
    block: int,
    order: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """w [R, i] float32 -> codes [R, i], scale [R, G], zero [R, G], all float32; `group` inputs share a scale.

    For column j: q_j = round(w_j), e = (w_j - q_j) / U_jj, W[:, j:] -= e U[j, j:]. A group's grid is fitted
    when its first column is reached. With `order`, a permutation of the columns that U is in too, columns are
    rounded in that order and every grid is fitted beforehand, so no index is stored.
    """
    rows, inputs = w.shape
    scale, zero = fit(w.view(rows, -1, group), bits, symmetric, store)
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
                part = wt[start + j : start + j + group].T.unsqueeze(1)
                scale[:, at : at + 1], zero[:, at : at + 1] = fit(part, bits, symmetric, store)
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
    """||(W - W') X|| / ||W X|| over the inputs that made H."""
    gap = w - rounded
    lost = float((gap @ h * gap).sum(dtype=torch.float64))
    kept = float((w @ h * w).sum(dtype=torch.float64))
    return (max(lost, 0.0) / kept) ** 0.5 if kept > 0 else 0.0
