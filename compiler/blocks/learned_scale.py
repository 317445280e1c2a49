"""LearnedScale: one trained number that a branch is multiplied by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from effc.compiler.blocks.linear import dtype_name
from effc.compiler.blocks.unit import Unit, empty
from effc.compiler.ops_state import times

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value


class LearnedScale(Unit):
    """y = w x, w [1]; x [..., d]."""

    weight: nn.Parameter

    def __init__(self, *, dtype: str = "float32") -> None:
        super().__init__()
        self.weight = empty(1, dtype=dtype)

    @property
    def dtype(self) -> str:
        return dtype_name(self.weight)

    def expand(self, ops: Ops, x: Value) -> Value:
        return ops("times", x, ops.weight("weight"))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = times(x, self.weight)
        return y
