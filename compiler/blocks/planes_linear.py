"""PlanesLinear: a linear whose weight is a sum of planes of signs times scales.

Shapes and storage as in compiler/planes.py: x [..., i], W [o, i], P planes, A and B runs of rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from effc.compiler.blocks.unit import Unit, empty, empty_buffer
from effc.compiler.planes import dense

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value


class PlanesLinear(Unit):
    """y = x W^T + bias, W = sum_p a_p b_p: P o ceil(i / 8) bytes of signs, and A B scales a plane.

    Computed in the dtype of x. `terms` powers of two make a scale, an int8 exponent each; 0: scales are
    float16. `dtype` is that of the bias.
    """

    signs: Tensor
    scales: Tensor

    def __init__(
        self,
        *,
        in_features: int,
        out_features: int,
        planes: int,
        down: int,
        across: int,
        terms: int = 1,
        bias: bool = False,
        dtype: str = "float32",
    ) -> None:
        """`down` runs of rows and `across` runs of columns have scales of their own."""
        super().__init__()
        if not 1 <= planes <= 4:
            raise ValueError(f"{planes} planes; a weight has 1 to 4")
        if not 0 <= terms <= 3:
            raise ValueError(f"{terms} powers of two in a scale; 1 to 3, or 0 for half precision")
        for side, runs, size in (("rows", down, out_features), ("columns", across, in_features)):
            if not runs or size % runs:
                raise ValueError(f"{runs} runs do not divide {size} {side}")
        self.in_features = in_features
        self.out_features = out_features
        self.planes = planes
        self.down = down
        self.across = across
        self.terms = terms
        self.dtype = dtype
        self.register_buffer("signs", empty_buffer(planes, out_features, -(-in_features // 8), dtype="uint8"))
        stored: Literal["int8", "float16"] = "int8" if terms else "float16"
        self.register_buffer("scales", empty_buffer(planes, max(1, terms), down, across, dtype=stored))
        self.register_parameter("bias", empty(out_features, dtype=dtype) if bias else None)

    def spec(self) -> dict[str, Any]:
        return super().spec() | {"bias": self.bias is not None}

    def stored(self) -> Iterator[tuple[Tensor, int]]:
        """Signs stand for the weights."""
        yield self.signs, self.in_features * self.out_features
        yield self.scales, 0
        if (bias := self._parameters.get("bias")) is not None:
            yield bias, bias.numel()

    def drawn(self, slot: str, dice: torch.Generator) -> Tensor | None:
        if slot == "signs":
            signs = torch.randint(0, 256, tuple(self.signs.shape), generator=dice)
            return _trimmed(signs, self.in_features).to(torch.uint8)
        if slot != "scales":
            return None
        low = torch.randint(-6, -3, tuple(self.scales.shape), generator=dice)
        return low.to(torch.int8) if self.terms else torch.ldexp(torch.ones(low.shape), low).half()

    def flops(self, mean: int) -> int:
        return 2 * self.in_features * self.out_features

    def dense(self) -> Tensor:
        """W [o, i] float32"""
        return dense(self.signs, self.scales, self.in_features)

    def expand(self, ops: Ops, x: Value) -> Value:
        weight = ops("planes", ops.weight("signs"), ops.weight("scales"), columns=self.in_features)
        bias = ops.weight("bias") if self.bias is not None else None
        return ops("linear", x, ops("cast_like", weight, x), bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense().to(x.dtype), cast("Tensor | None", self.bias))


def _trimmed(signs: Tensor, columns: int) -> Tensor:
    """Bits behind the last column are zero, so that equal matrices are equal bytes."""
    if columns % 8:
        signs[..., -1] &= (1 << columns % 8) - 1
    return signs
