"""A model whose packed linear layers run on torch's own ops: the path without a C compiler."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from effc.compiler.blocks.quant_linear import QuantLinear
from effc.compiler.blocks.unit import DTYPES
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.kernels.torch_linear import TorchPacked, linear, pack


class ByTorch(nn.Module):
    """Stands for a QuantLinear; it can be run and nothing else."""

    def __init__(self, packed: TorchPacked, bias: Tensor | None) -> None:
        super().__init__()
        self.packed, self.bias = packed, bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]"""
        y = linear(x, self.packed)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def by_torch(model: Model) -> Model:
    """A model with the same blocks and every QuantLinear on torch's packed ops; its weights are read."""
    model.materialize()
    rw = Rewriter(model, "lower.by_torch")
    with rw.together():
        for path, unit in list(model.units()):
            if isinstance(unit, QuantLinear):
                packed = pack(unit.bits, *unit.unpack(), DTYPES[unit.dtype])
                rw.swap(path, ByTorch(packed, cast("Tensor | None", unit.bias)))
    return rw.model
