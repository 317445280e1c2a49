"""LowRankLinear: a linear whose weight is a product of two thin matrices.

Shapes: x [..., i], A [r, i], B [o, r], r <= min(o, i); W = B A.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from effc.compiler.blocks.linear import dtype_name
from effc.compiler.blocks.unit import Unit, empty

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value


class LowRankLinear(Unit):
    """y = B (A x) + bias: r (o + i) weights and as many multiplications instead of o i."""

    a: nn.Parameter
    b: nn.Parameter

    def __init__(
        self, *, in_features: int, out_features: int, rank: int, bias: bool = False, dtype: str = "float32"
    ) -> None:
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(f"rank {rank} is not in 1..{min(in_features, out_features)}")
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.a = empty(rank, in_features, dtype=dtype)
        self.b = empty(out_features, rank, dtype=dtype)
        self.register_parameter("bias", empty(out_features, dtype=dtype) if bias else None)

    @property
    def dtype(self) -> str:
        return dtype_name(self.a)

    def spec(self) -> dict[str, Any]:
        return super().spec() | {"bias": self.bias is not None}

    def flops(self, mean: int) -> int:
        return 2 * self.rank * (self.in_features + self.out_features)

    def dense(self) -> Tensor:
        """B A [o, i], float64 where the factors are, else float32"""
        a, b = (t if t.element_size() == 8 else t.float() for t in (self.a, self.b))
        return b @ a

    def expand(self, ops: Ops, x: Value) -> Value:
        bias = ops.weight("bias") if self.bias is not None else None
        return ops("linear", ops("linear", x, ops.weight("a")), ops.weight("b"), bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a), self.b, cast("Tensor | None", self.bias))
