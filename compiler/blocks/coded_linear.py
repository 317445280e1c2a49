"""CodedLinear: a linear whose weights and inputs both lie on uniform grids, so that integers multiply.

Shapes: x [..., i], W [o, i]. Codes are signed integers of b bits: x' = s (q - z) with
q = clip(round(x / s) + z, -2^(b-1), 2^(b-1) - 1); s and z are two numbers that the whole layer shares.
Stored: W as in quant_linear.py, input_scale [1] float32, input_zero [1] int16.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from effc.compiler.blocks.quant_linear import Packed, ScaleDtype
from effc.compiler.blocks.unit import Unit, empty, empty_buffer

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value


def codes(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest codes of x [..., i], half to even, as numbers of x's dtype (float32 at least).

    scale and zero are [1], or [i] for a grid of each channel's own; their zeros may lie beyond the codes.
    """
    half = 1 << (bits - 1)
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return (torch.round(wide / scale) + zero).clamp(-half, half - 1)


def on_grid(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """What the codes of x stand for, in x's dtype."""
    return ((codes(x, scale, zero, bits) - zero) * scale).to(x.dtype)


class CodedLinear(Packed, Unit):
    """y = x' W^T + b, with W packed and x' the point of the layer's grid that is nearest to x."""

    input_scale: Tensor
    input_zero: Tensor

    def __init__(
        self,
        *,
        in_features: int,
        out_features: int,
        bits: int,
        group: int,
        input_bits: int,
        symmetric: bool = True,
        scale_dtype: ScaleDtype = "float16",
        bias: bool = False,
        dtype: str = "float32",
    ) -> None:
        """`input_bits` are those of an input's code; the rest as in QuantLinear."""
        super().__init__()
        if not 2 <= input_bits <= 8:
            raise ValueError(f"{input_bits} bits; a coded input has 2 to 8")
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        self.group = group
        self.input_bits = input_bits
        self.symmetric = symmetric
        self.scale_dtype = scale_dtype
        self.dtype = dtype
        self._store(out_features)
        self.register_buffer("input_scale", empty_buffer(1, dtype="float32"))
        self.register_buffer("input_zero", empty_buffer(1, dtype="int16"))
        self.register_parameter("bias", empty(out_features, dtype=dtype) if bias else None)

    def spec(self) -> dict[str, Any]:
        return super().spec() | {"bias": self.bias is not None}

    def stored(self) -> Iterator[tuple[Tensor, int]]:
        yield from super().stored()
        yield self.input_scale, 0
        yield self.input_zero, 0

    def flops(self, mean: int) -> int:
        return 2 * self.in_features * self.out_features

    def drawn(self, slot: str, dice: torch.Generator) -> Tensor | None:
        """A grid that inputs of order one fill; zero in its middle."""
        if slot == "input_scale":
            return torch.full((1,), 4.0 / (1 << self.input_bits))
        return torch.zeros(1, dtype=torch.int16) if slot == "input_zero" else None

    def expand(self, ops: Ops, x: Value) -> Value:
        grid = ops.weight("input_scale"), ops.weight("input_zero")
        near = ops("on_grid", x, *grid, bits=self.input_bits)
        weight = ops("cast_like", self.expand_dense(ops), x)
        return ops("linear", near, weight, ops.weight("bias") if self.bias is not None else None)

    def forward(self, x: Tensor) -> Tensor:
        near = on_grid(x, self.input_scale, self.input_zero, self.input_bits)
        return F.linear(near, self.dense().to(x.dtype), cast("Tensor | None", self.bias))
