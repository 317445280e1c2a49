"""LoraLinear: a linear with a trainable low-rank change beside it.

Shapes: x [..., i], base W [o, i] dense or packed, A [r, i], B [o, r].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effc.compiler.blocks.linear import Linear
from effc.compiler.blocks.quant_linear import QuantLinear
from effc.compiler.blocks.unit import Unit, empty

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value

Scaling = Literal["rank", "sqrt_rank"]
Base = Linear | QuantLinear


class LoraLinear(Unit):
    """y = base(x) + s B A x, with s = alpha / rank, or alpha / sqrt(rank)."""

    a: nn.Parameter
    b: nn.Parameter
    base: Base

    def __init__(
        self,
        *,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        scaling: Scaling = "rank",
        dropout: float = 0.0,
        bias: bool = False,
        dtype: str = "float32",
    ) -> None:
        """The base starts dense; `over` puts another one there. `dropout` acts on x in training."""
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(f"rank {rank} is not in 1..{min(in_features, out_features)}")
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.alpha = alpha
        self.scaling = scaling
        self.dropout = dropout
        self.bias = bias
        self.dtype = dtype
        self.base = Linear(in_features=in_features, out_features=out_features, bias=bias, dtype=dtype)
        self.a = empty(rank, in_features, dtype=dtype)
        self.b = empty(out_features, rank, dtype=dtype)

    @classmethod
    def over(cls, base: Base, rank: int, alpha: float, scaling: Scaling, dropout: float = 0.0) -> Self:
        """An adapter without weights around an existing linear, in the linear's dtype."""
        unit = cls(
            in_features=base.in_features,
            out_features=base.out_features,
            rank=rank,
            alpha=alpha,
            scaling=scaling,
            dropout=dropout,
            bias=base.bias is not None,
            dtype=base.dtype,
        )
        unit.base = base
        return unit

    @property
    def factor(self) -> float:
        """s"""
        return self.alpha / (self.rank if self.scaling == "rank" else math.sqrt(self.rank))

    def stored(self) -> Iterator[tuple[Tensor, int]]:
        for tensor in (self.a, self.b):
            yield tensor, tensor.numel()

    def flops(self, mean: int) -> int:
        return 2 * self.rank * (self.in_features + self.out_features)

    def change(self) -> Tensor:
        """s B A [o, i], in float64 when the factors are, else in float32."""
        a, b = (t if t.element_size() == 8 else t.float() for t in (self.a, self.b))
        return self.factor * (b @ a)

    def expand(self, ops: Ops, x: Value) -> Value:
        a, b = (ops("cast_like", ops.weight(name), x) for name in ("a", "b"))
        low = ops("scale", ops("linear", x, a, None), factor=self.factor)
        return ops("add", ops.inline("base", self.base, x), ops("linear", low, b, None))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.dropout(x, self.dropout, self.training) if self.dropout else x
        low = F.linear(inner, self.a.to(x.dtype))
        low, y = low * low.new_tensor(self.factor), self.base(x)
        # One product that adds up: a pass over [..., o] less than a product and a sum.
        rows = y.reshape(-1, self.out_features), low.reshape(-1, self.rank)
        return torch.addmm(*rows, self.b.to(x.dtype).t()).view(y.shape)
