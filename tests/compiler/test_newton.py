"""Recurrent cells solved all at once: the same states and gradients as token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from effc.compiler.newton import CELLS, GATES, PEEPS, STATES, newton, sequential, solve

HOW: dict[str, Any] = {"jac": "diag", "iters": 3, "omega": 1.0, "tol": 1e-4}
CIFG = HOW | {"jac": "block2"}


def case(cell: str, length: int = 256, width: int = 32, size: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, diagonal weights and a start of two rows, float64."""
    dice = torch.Generator().manual_seed(3)
    u = torch.randn(2, length, GATES[cell], width, generator=dice, dtype=torch.float64)
    a = (torch.rand(PEEPS[cell], width, generator=dice, dtype=torch.float64) - 0.5) * size
    return u, a, torch.randn(2, STATES[cell], width, generator=dice, dtype=torch.float64) * 0.3


def both(cell: str, **more: Any) -> tuple[Tensor, Tensor]:
    u, a, start = case(cell)
    how = (CIFG if cell == "lstm_cifg" else HOW) | more
    return newton(cell, u, a, start, None, None, **how)[0], sequential(cell, u, a, start)  # type: ignore[arg-type]


@pytest.mark.parametrize("cell", CELLS)
def test_j_is_the_derivative_of_the_cell(cell: str) -> None:
    u, a, start = case(cell, 1, 5)
    _, jac = CELLS[cell](start, u[:, 0], a)
    found = torch.autograd.functional.jacobian(lambda h: CELLS[cell](h, u[:, 0], a)[0], start)
    for b in range(2):
        for d in range(5):
            torch.testing.assert_close(jac[b, :, :, d], found[b, :, d, b, :, d])
    others = found[0, :, 0, 0, :, 1]
    assert torch.equal(others, torch.zeros_like(others))


@pytest.mark.parametrize("cell", CELLS)
def test_three_steps_find_the_sequence(cell: str) -> None:
    found, want = both(cell, tol=1e9)
    assert float((found - want).abs().max()) < 1e-4


@pytest.mark.parametrize("cell", CELLS)
def test_errors_fall_as_newtons_do(cell: str) -> None:
    errors = []
    for iters in (1, 2, 3, 4):
        found, want = both(cell, iters=iters, tol=1e9)
        errors.append(float((found - want).abs().max()))
    assert errors[1] < errors[0] / 10
    assert errors[2] < errors[1] / 100
    assert errors[3] < 1e-10


def test_a_diagonal_of_blocks_takes_more_steps() -> None:
    exact = both("lstm_cifg", iters=4, tol=1e9)
    rough = both("lstm_cifg", iters=4, tol=1e9, jac="diag")
    many = both("lstm_cifg", iters=25, tol=1e9, jac="diag")
    gaps = [float((found - want).abs().max()) for found, want in (exact, rough, many)]
    assert gaps[0] < gaps[1]
    assert gaps[2] < 1e-4


def test_what_does_not_converge_runs_token_by_token() -> None:
    """Large recurrent weights: states run away from each other and steps overshoot."""
    u, a, start = case("gru", size=60.0)
    found, _ = newton("gru", u, a, start, None, None, **(HOW | {"iters": 1, "tol": 1e-12}))
    assert torch.equal(found, sequential("gru", u, a, start))


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_are_those_of_backpropagation_through_time(cell: str) -> None:
    u, a, start = case(cell, 40, 6)
    how = (CIFG if cell == "lstm_cifg" else HOW) | {"iters": 8, "tol": 1e-12}
    weight = torch.randn(
        2, 40, STATES[cell], 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    grads = []
    for run in (
        lambda u, a: solve(cell, u, a, start, None, None, **how),  # type: ignore[arg-type]
        lambda u, a: sequential(cell, u, a, start),  # type: ignore[arg-type]
    ):
        given = [t.clone().requires_grad_() for t in (u, a)]
        (run(*given) * weight).sum().backward()
        grads.append([t.grad for t in given])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("cell", CELLS)
def test_padding_and_documents_are_kept_apart(cell: str) -> None:
    u, a, start = case(cell, 20, 4)
    keep, fresh = torch.zeros(2, 20, dtype=torch.bool), torch.zeros(2, 20, dtype=torch.bool)
    keep[0, :5] = True
    fresh[1, 12] = True
    how = (CIFG if cell == "lstm_cifg" else HOW) | {"iters": 12, "tol": 1e-9}
    found = solve(cell, u, a, torch.zeros_like(start), keep, fresh, **how)  # type: ignore[arg-type]
    zero = torch.zeros_like(start)
    torch.testing.assert_close(found[0, 5:], sequential(cell, u[:1, 5:], a, zero[:1])[0])  # type: ignore[arg-type]
    torch.testing.assert_close(found[1, 12:], sequential(cell, u[1:, 12:], a, zero[1:])[0])  # type: ignore[arg-type]
