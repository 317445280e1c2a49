"""The definition of grouped_linear in plain torch, in double precision.

Shapes: M rows (tokens), k experts of each, E experts, K columns, N channels. The number E stands for none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effc.kernels.epilogue import apply


def route(scores: Tensor, active: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """scores [M, E] of the router -> weights [M, k] float64 and chosen [M, k] int64, as blocks/moe.py has it.

    p = softmax(scores), the k largest, of equal ones the lower number first.
    """
    p, order = torch.softmax(scores.double(), -1).sort(dim=-1, descending=True, stable=True)
    weights, chosen = p[:, :active], order[:, :active]
    return (weights / weights.sum(-1, keepdim=True) if renormalize else weights), chosen


def linear(x: Tensor, w: Tensor, experts: Tensor) -> Tensor:
    """x [S, K] with an expert each [S], w [E, N, K] -> [S, N] float64, zero where there is none."""
    y = x.new_zeros(x.shape[0], w.shape[1], dtype=torch.float64)
    for expert in experts.unique().tolist():
        if 0 <= expert < w.shape[0]:
            rows = experts == expert
            y[rows] = x[rows].double() @ w[expert].double().t()
    return y


def paired(y: Tensor, epilogue: Sequence[str]) -> Tensor:
    """y [S, 2 N], gate first -> epilogue(gate) * up [S, N] float32, the epilogue an activation alone."""
    half = y.shape[1] // 2
    return apply(epilogue, y[:, :half].float(), {}) * y[:, half:].float()


def mixture(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, chosen: Tensor, activation: str
) -> Tensor:
    """x [M, D], gate_up [E, 2 F, D], down [E, D, F], weights and chosen [M, k] -> y [M, D] float64.

    The way between is float32; sum over k of weight times expert.
    """
    m, active = chosen.shape
    slots = chosen.flatten()
    inner = paired(linear(x.repeat_interleave(active, 0), gate_up, slots), (activation,))
    y = linear(inner, down, slots).view(m, active, -1)
    return (y * weights.double().unsqueeze(-1)).sum(1)
