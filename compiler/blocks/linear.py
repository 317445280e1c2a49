"""Linear and StackedLinear: the units that hold weight matrices.

Shapes: W [o, i] = [out, in], so y = x W^T; a stack of E experts is [E, o, i].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from effc.compiler.blocks.unit import Unit, empty

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


class Linear(Unit):
    """y = x W^T + b, with W [out_features, in_features]."""

    weight: nn.Parameter

    def __init__(
        self, *, in_features: int, out_features: int, bias: bool = False, dtype: str = "float32"
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = empty(out_features, in_features, dtype=dtype)
        self.register_parameter("bias", empty(out_features, dtype=dtype) if bias else None)

    @property
    def dtype(self) -> str:
        return dtype_name(self.weight)

    def spec(self) -> dict[str, Any]:
        return super().spec() | {"bias": self.bias is not None}

    def flops(self, mean: int) -> int:
        return 2 * self.in_features * self.out_features

    def expand(self, ops: Ops, x: Value) -> Value:
        return ops("linear", x, ops.weight("weight"), ops.weight("bias") if self.bias is not None else None)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, cast(Tensor | None, self.bias))


class StackedLinear(Unit):
    """E linears of one shape in one tensor [experts, out_features, in_features], no bias."""

    weight: nn.Parameter

    def __init__(self, *, experts: int, in_features: int, out_features: int, dtype: str = "float32") -> None:
        super().__init__()
        self.experts = experts
        self.in_features = in_features
        self.out_features = out_features
        self.weight = empty(experts, out_features, in_features, dtype=dtype)

    @property
    def dtype(self) -> str:
        return dtype_name(self.weight)

    def expand_stack(self, ops: Ops) -> Value:
        """The weights [E, o, i] as a value."""
        return ops.weight("weight")

    def matrix(self, expert: int) -> Tensor:
        """The weight [o, i] of one expert."""
        return self.weight[expert]

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """x [N, i] through one expert -> [N, o]."""
        return F.linear(x, self.matrix(expert))
