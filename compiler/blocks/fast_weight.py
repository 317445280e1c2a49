"""FastWeight and Affine: what a fast network starts from in every sequence, and the gains of what it reads.

Shapes: N heads, W [N, o, i] or left [N, o, r] and right [N, r, i]; x [..., d].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from effc.compiler.blocks.unit import Unit, empty
from effc.compiler.ops_state import half_identity

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value


class FastWeight(Unit):
    """W, or left right + I / 2 where a rank is given: one matrix a head."""

    def __init__(self, *, heads: int, rows: int, columns: int, rank: int = 0, dtype: str = "float32") -> None:
        """`rank`: 0 for a whole matrix."""
        super().__init__()
        if 0 in (heads, rows, columns):
            raise ValueError(f"{heads} heads of [{rows}, {columns}]: none may be 0")
        self.heads = heads
        self.rows = rows
        self.columns = columns
        self.rank = rank
        self.dtype = dtype
        if rank:
            self.left = empty(heads, rows, rank, dtype=dtype)
            self.right = empty(heads, rank, columns, dtype=dtype)
        else:
            self.weight = empty(heads, rows, columns, dtype=dtype)

    def expand(self, ops: Ops, x: Value) -> Value:
        """The matrices alone; x is not read."""
        if not self.rank:
            return ops.weight("weight")
        return ops("half_identity", ops.weight("left"), ops.weight("right"))

    def forward(self) -> Tensor:
        """[N, o, i]"""
        found: Tensor = half_identity(self.left, self.right) if self.rank else self.weight
        return found


class Affine(Unit):
    """y = x * weight + bias, channel by channel."""

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, *, width: int, dtype: str = "float32") -> None:
        super().__init__()
        self.width = width
        self.dtype = dtype
        self.weight = empty(width, dtype=dtype)
        self.bias = empty(width, dtype=dtype)

    def expand(self, ops: Ops, x: Value) -> Value:
        return ops("add", ops("gate", x, ops.weight("weight")), ops.weight("bias"))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias
