"""Blocks around the head: soft-capping of logits and scaling. The head itself is a Linear."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from effc.compiler.blocks.unit import Unit

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value


class Softcap(Unit):
    """y = cap tanh(x / cap): logits stay within (-cap, cap)."""

    def __init__(self, *, cap: float) -> None:
        super().__init__()
        if cap <= 0:
            raise ValueError(f"the cap must be above 0, not {cap}")
        self.cap = cap

    def expand(self, ops: Ops, x: Value) -> Value:
        return ops("softcap", x, cap=self.cap)

    def forward(self, x: Tensor) -> Tensor:
        return softcap(x, self.cap)


class Scale(Unit):
    """y = x * factor."""

    def __init__(self, *, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def expand(self, ops: Ops, x: Value) -> Value:
        return ops("scale", x, factor=self.factor)

    def forward(self, x: Tensor) -> Tensor:
        return x * x.new_tensor(self.factor)


def softcap(x: Tensor, cap: float) -> Tensor:
    return torch.tanh(x / cap) * cap
