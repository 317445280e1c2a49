"""Epilogues: what a kernel does to its result before it is stored; one entry for kernel and reference.

Symbols: y [M, N] the result, m a row, n a column. An epilogue chain is a tuple of names, applied in order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Epilogue:
    """One step on the accumulator.

    `c` is an expression over the vector `a` of `count <= 16` columns from `n` of row `m`; `triton` lines
    work on `acc` [BN, BM] with columns `rn`, rows `rm` and their `mask`; `torch` is the definition, on y
    [M, N] float32.
    """

    operand: str | None
    """Name of the further tensor it reads: [N] for a vector of columns, [M] of rows, [M, N] for a matrix."""
    shape: str
    """"", "N", "M" or "MN": the shape of the operand"""
    c: str
    triton: tuple[str, ...]
    torch: Callable[..., Tensor]


EPILOGUES: Mapping[str, Epilogue] = {
    "bias": Epilogue(
        "bias", "N", "a + take(bias + n, count)",
        ("acc += tl.load(bias + rn, mask=rn < N, other=0.0).to(tl.float32)[:, None]",),
        lambda y, bias: y + bias.float(),
    ),
    "silu": Epilogue(None, "", "a * sigmoid(a)", ("acc = acc * tl.sigmoid(acc)",), F.silu),
    "gelu": Epilogue(
        None, "", "0.5f * a * (1.0f + error_function(a * 0.70710678118f))",
        ("acc = 0.5 * acc * (1.0 + tl.erf(acc * 0.70710678118))",),
        F.gelu,
    ),
    "gelu_tanh": Epilogue(
        None, "", "0.5f * a * (1.0f + hyperbolic_tangent(0.79788456080f * (a + 0.044715f * a * a * a)))",
        (
            "inner = 0.79788456080 * (acc + 0.044715 * acc * acc * acc)",
            "acc = acc * tl.sigmoid(2.0 * inner)",
        ),
        lambda y: F.gelu(y, approximate="tanh"),
    ),
    "relu": Epilogue(
        None, "", "choose(a < 0.0f, all(0.0f), a)", ("acc = tl.where(acc < 0.0, 0.0, acc)",), F.relu,
    ),
    "relu2": Epilogue(
        None, "", "choose(a < 0.0f, all(0.0f), a * a)", ("acc = tl.where(acc < 0.0, 0.0, acc * acc)",),
        lambda y: F.relu(y).square(),
    ),
    "quick_gelu": Epilogue(
        None, "", "a * sigmoid(1.702f * a)", ("acc = acc * tl.sigmoid(1.702 * acc)",),
        lambda y: y * torch.sigmoid(1.702 * y),
    ),
    "tanh": Epilogue(
        None, "", "hyperbolic_tangent(a)", ("acc = 2.0 * tl.sigmoid(2.0 * acc) - 1.0",), torch.tanh,
    ),
    "mul": Epilogue(
        "gate", "MN", "a * take(gate + m * N + n, count)",
        ("acc *= tl.load(gate + rm[None, :] * N + rn[:, None], mask=mask, other=0.0).to(tl.float32)",),
        lambda y, gate: y * gate.float(),
    ),
    "row_scale": Epilogue(
        "row_scale", "M", "a * row_scale[m]",
        ("acc *= tl.load(row_scale + rm, mask=rm < M, other=0.0).to(tl.float32)[None, :]",),
        lambda y, row_scale: y * row_scale.float()[:, None],
    ),
    "residual": Epilogue(
        "residual", "MN", "a + take(residual + m * N + n, count)",
        ("acc += tl.load(residual + rm[None, :] * N + rn[:, None], mask=mask, other=0.0).to(tl.float32)",),
        lambda y, residual: y + residual.float(),
    ),
}  # fmt: skip
"""`gelu` in Triton's text and in C agree with torch to 2e-7; the others differ by rounding alone."""


ACTIVATIONS: frozenset[str] = frozenset({"silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu", "tanh"})
"""Steps that a paired kernel may begin with; the activations that models have (compiler/blocks/mlp.py)."""


def operands(chain: Sequence[str]) -> list[str]:
    """Names of the tensors that a chain reads, in order, each once."""
    return list(dict.fromkeys(o for name in chain if (o := EPILOGUES[name].operand)))


def apply(chain: Sequence[str], y: Tensor, given: Mapping[str, Tensor]) -> Tensor:
    """The chain in plain torch on y [M, N] float32."""
    for name in chain:
        step = EPILOGUES[name]
        y = step.torch(y, given[step.operand]) if step.operand else step.torch(y)
    return y.to(torch.float32)
