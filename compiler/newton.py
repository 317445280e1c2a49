"""Nonlinear recurrences all at once: Newton's method over the whole sequence, each step one parallel scan.

    h_t = f(h_{t-1}, x_t) for all t is F(H) = 0. With r_t = f(h_{t-1}) - h_t and J_t = df/dh at h_{t-1}, the
    step solves d_t = J_t d_{t-1} + r_t, and H += omega d.

The cells' J are diagonal, or one 2 x 2 block a channel. Shapes: inputs [B, T, G, d] of G gates, parameters
a [P, d], states h [B, T, S, d] (S = 1: h; S = 2: c and h), J [B, T, S, S, d] (or diagonal [B, T, S, d]).
Source: ParaRNN, arXiv 2510.21450, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

Cell = Literal["gru", "lstm_cifg"]
Jac = Literal["diag", "block2"]
GATES = {"gru": 3, "lstm_cifg": 3}
"""Inputs of a cell: z, r, c; or f, c, o."""
PEEPS = {"gru": 3, "lstm_cifg": 5}
"""Diagonal weights of a cell: a_z, a_r, a_c; or a_f, a_c, a_o, p_f, p_o."""
STATES = {"gru": 1, "lstm_cifg": 2}

Solve = Callable[[Tensor, Tensor], Tensor]


def gru(h: Tensor, u: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """h [.., 1, d], u [.., 3, d], a [3, d] -> the next h, and J [.., 1, 1, d].

    z = sigma(a_z h + u_z), r = sigma(a_r h + u_r), c = tanh(a_c r h + u_c), h' = (1 - z) h + z c
    """
    old = h[..., 0, :]
    z, r = torch.sigmoid(a[0] * old + u[..., 0, :]), torch.sigmoid(a[1] * old + u[..., 1, :])
    c = torch.tanh(a[2] * r * old + u[..., 2, :])
    new = (1 - z) * old + z * c
    inner = r + old * r * (1 - r) * a[1]
    jac = (1 - z) + (c - old) * z * (1 - z) * a[0] + z * (1 - c * c) * a[2] * inner
    return new.unsqueeze(-2), jac[..., None, None, :]


def lstm_cifg(state: Tensor, u: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """state [.., 2, d] of c and h, u [.., 3, d], a [5, d] -> the next state, and J [.., 2, 2, d].

    f = sigma(a_f h + u_f + p_f c), k = tanh(a_c h + u_c), c' = f c + (1 - f) k, o = sigma(a_o h + u_o + p_o
    c'), h' = o tanh c'
    """
    c, h = state[..., 0, :], state[..., 1, :]
    f = torch.sigmoid(a[0] * h + u[..., 0, :] + a[3] * c)
    k = torch.tanh(a[1] * h + u[..., 1, :])
    new = f * c + (1 - f) * k
    o = torch.sigmoid(a[2] * h + u[..., 2, :] + a[4] * new)
    flat = torch.tanh(new)
    swing = (c - k) * f * (1 - f)
    by_c, by_h = f + swing * a[3], swing * a[0] + (1 - f) * (1 - k * k) * a[1]
    through = o * (1 - flat * flat) + flat * o * (1 - o) * a[4]
    rows = (by_c, by_h, through * by_c, through * by_h + flat * o * (1 - o) * a[2])
    return torch.stack((new, o * flat), -2), torch.stack(rows, -2).unflatten(-2, (2, 2))


CELLS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "gru": gru,
    "lstm_cifg": lstm_cifg,
}


def solve(
    cell: Cell, u: Tensor, a: Tensor, start: Tensor, keep: Tensor | None, fresh: Tensor | None, **how: Any
) -> Tensor:
    """States [B, T, S, d] of a sequence behind the state `start` [B, S, d].

    Where `keep` [B, T] is true a token is padding: the state stays. Where `fresh` is, a document begins,
    from zero. `how`: jac, iters, omega, tol, as `newton` has them. Gradients are exact at the states that
    are found, by one scan backwards; they reach u and a, and not `start`.
    """
    with torch.no_grad():
        found, jac = newton(cell, u, a, start, keep, fresh, **how)
    before = _shifted(found, start, fresh)
    y, _ = CELLS[cell](before, u, a)
    y = y if keep is None else torch.where(keep[..., None, None], before, y)
    return _Implicit.apply(y, jac)  # type: ignore[no-any-return, no-untyped-call]


def newton(
    cell: Cell,
    u: Tensor,
    a: Tensor,
    start: Tensor,
    keep: Tensor | None,
    fresh: Tensor | None,
    *,
    jac: Jac,
    iters: int,
    omega: float,
    tol: float,
) -> tuple[Tensor, Tensor]:
    """The states and J at them. Where the largest residual is above `tol` after `iters` steps, token by
    token.
    """

    def step(h: Tensor) -> tuple[Tensor, Tensor]:
        before = _shifted(h, start, fresh)
        y, j = CELLS[cell](before, u, a)
        if keep is not None:
            y = torch.where(keep[..., None, None], before, y)
            j = torch.where(keep[..., None, None, None], _identity(j), j)
        return y, j if fresh is None else j.masked_fill(fresh[..., None, None, None], 0.0)

    if u.shape[1] == 1:
        return step(start.unsqueeze(1))  # one token needs no solving: its past is `start`
    h, _ = step(torch.zeros_like(start).unsqueeze(1).expand(-1, u.shape[1], -1, -1))
    for _ in range(iters):
        y, j = step(h)
        h = h + omega * _scan(_cut(j) if jac == "diag" else j, y - h)
    y, j = step(h)
    if not bool((y - h).abs().amax() <= tol):  # NaN as well
        h = sequential(cell, u, a, start, keep, fresh)
        _, j = step(h)
    return h, j


def sequential(
    cell: Cell, u: Tensor, a: Tensor, start: Tensor, keep: Tensor | None = None, fresh: Tensor | None = None
) -> Tensor:
    """Token by token: the definition."""
    state, states = start, []
    for t in range(u.shape[1]):
        before = state if fresh is None else state.masked_fill(fresh[:, t, None, None], 0.0)
        state, _ = CELLS[cell](before, u[:, t], a)
        if keep is not None:
            state = torch.where(keep[:, t, None, None], before, state)
        states.append(state)
    return torch.stack(states, 1)


class _Implicit(torch.autograd.Function):
    """Hands states through; backwards, what reaches a state from all later ones: l_t = g_t + J_{t+1}^T
    l_{t+1}.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, jac: Tensor) -> Tensor:
        ctx.save_for_backward(jac)
        return y.clone()

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None]:
        (jac,) = ctx.saved_tensors
        turned = jac.transpose(2, 3).flip(1)
        behind = torch.cat((torch.zeros_like(turned[:, :1]), turned[:, :-1]), 1)
        return _scan(behind, grad.flip(1)).flip(1), None


def _scan(j: Tensor, r: Tensor) -> Tensor:
    """d_t = J_t d_{t-1} + r_t, d before the first zero, in log2 T rounds; r [B, T, S, d].

    Pairs (J, r) join as (J2 J1, J2 r1 + r2).
    """
    length, reach = r.shape[1], 1
    while reach < length:
        later = j[:, reach:]
        r = torch.cat((r[:, :reach], _times(later, r[:, :-reach]) + r[:, reach:]), 1)
        if 2 * reach < length:
            j = torch.cat((j[:, :reach], _join(later, j[:, :-reach])), 1)
        reach *= 2
    return r


def _times(j: Tensor, x: Tensor) -> Tensor:
    """[B, T, S, S, d] or diagonal [B, T, S, d] by [B, T, S, d]"""
    return j * x if j.dim() == x.dim() else (j * x.unsqueeze(2)).sum(3)


def _join(later: Tensor, earlier: Tensor) -> Tensor:
    if later.dim() == 4:
        return later * earlier
    return (later.unsqueeze(4) * earlier.unsqueeze(2)).sum(3)


def _cut(j: Tensor) -> Tensor:
    """The diagonal [B, T, S, d] of blocks"""
    return j.diagonal(dim1=2, dim2=3).movedim(-1, 2)


def _identity(j: Tensor) -> Tensor:
    return torch.eye(j.shape[-2], dtype=j.dtype, device=j.device).unsqueeze(-1).expand_as(j)


def _shifted(h: Tensor, start: Tensor, fresh: Tensor | None) -> Tensor:
    """What each token finds: the state before it"""
    before = torch.cat((start.unsqueeze(1), h[:, :-1]), 1)
    return before if fresh is None else before.masked_fill(fresh[..., None, None], 0.0)
