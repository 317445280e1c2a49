"""Embedding: token ids to vectors, with learned positions, token types and a norm where a model has them.

Shapes: ids [B, T] int64 -> x [B, T, D].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from effc.compiler.blocks.linear import dtype_name
from effc.compiler.blocks.norm import Norm
from effc.compiler.blocks.unit import Unit, empty
from effc.compiler.step import Step

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value


class Table(Unit):
    """A table of `rows` vectors looked up by index: learned positions, token types."""

    weight: nn.Parameter

    def __init__(self, *, rows: int, width: int, dtype: str = "float32") -> None:
        super().__init__()
        self.rows = rows
        self.width = width
        self.weight = empty(rows, width, dtype=dtype)

    @property
    def dtype(self) -> str:
        return dtype_name(self.weight)

    def expand(self, ops: Ops, x: Value) -> Value:
        return ops("embed", x, ops.weight("weight"))

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weight)


class Embedding(Unit):
    """x = norm(E[ids] scale + P[position + position_offset] + S[type]).

    A packed table subclasses this and overrides `lookup`, so the rest stays the same.
    """

    takes_step = True
    weight: nn.Parameter

    def __init__(
        self,
        *,
        vocab: int,
        width: int,
        scale: float = 1.0,
        positions: int = 0,
        position_offset: int = 0,
        types: int = 0,
        norm_eps: float = 0.0,
        count_padding: bool = False,
        dtype: str = "float32",
    ) -> None:
        """`positions`, `types`, `norm_eps`: 0 means none. `count_padding`: padding takes up positions."""
        super().__init__()
        self.vocab = vocab
        self.width = width
        self.scale = scale
        self.positions = positions
        self.position_offset = position_offset
        self.types = types
        self.norm_eps = norm_eps
        self.count_padding = count_padding
        self._tables(dtype)
        if positions:
            self.position = Table(rows=positions, width=width, dtype=dtype)
        if types:
            self.token_type = Table(rows=types, width=width, dtype=dtype)
        if norm_eps:
            self.norm = Norm(width=width, eps=norm_eps, form="layer", bias=True, dtype=dtype)

    def _tables(self, dtype: str) -> None:
        self.weight = empty(self.vocab, self.width, dtype=dtype)

    @property
    def dtype(self) -> str:
        return dtype_name(self.weight)

    def length(self, ids: Tensor) -> int:
        return ids.shape[1]

    def lookup(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)

    def expand_lookup(self, ops: Ops, ids: Value) -> Value:
        return ops("embed", ids, ops.weight("weight"))

    def expand(self, ops: Ops, x: Value) -> Value:
        y = self.expand_lookup(ops, x)
        if self.scale != 1.0:
            y = ops("scale", y, factor=self.scale)
        if self.types:
            kinds = ops("token_types", ops.step, x)
            y = ops("add", y, ops.inline("token_type", self.token_type, kinds))
        if self.positions:
            place = ops("shift", ops("positions", ops.step), by=self.position_offset)
            y = ops("add", y, ops.inline("position", self.position, place))
        return ops.inline("norm", self.norm, y) if self.norm_eps else y

    def forward(self, ids: Tensor, step: Step) -> Tensor:
        x = self.lookup(ids)
        if self.scale != 1.0:
            x = x * x.new_tensor(self.scale)  # rounded to the dtype first, as gemma does
        if self.types:
            kinds = step.token_types if step.token_types is not None else ids.new_zeros(ids.shape)
            x = x + self.token_type(kinds)
        if self.positions:
            x = x + self.position(step.positions + self.position_offset)
        return self.norm(x) if self.norm_eps else x
