"""PatchEmbed: an image to a row of vectors, a class token first.

Shapes: pixels [B, C, height, width] -> x [B, 1 + N, D] with N = (height / p) (width / p) patches of p x p.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effc.compiler.blocks.embedding import Table
from effc.compiler.blocks.linear import Linear
from effc.compiler.blocks.unit import Unit
from effc.compiler.step import Step

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value


class PatchEmbed(Unit):
    """x = [class, W patch + b] + P. W is [D, C p p], a convolution of stride p laid flat."""

    takes_step = True

    def __init__(
        self,
        *,
        image: int,
        patch: int,
        channels: int,
        width: int,
        bias: bool = True,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        if patch == 0 or image % patch:
            raise ValueError(f"an image of {image} pixels is not a whole number of patches of {patch}")
        self.image = image
        self.patch_size = patch
        self.channels = channels
        self.width = width
        self.bias = bias
        self.dtype = dtype
        self.patch = Linear(in_features=channels * patch * patch, out_features=width, bias=bias, dtype=dtype)
        self.cls = Table(rows=1, width=width, dtype=dtype)
        self.position = Table(rows=1 + (image // patch) ** 2, width=width, dtype=dtype)

    def spec(self) -> dict[str, Any]:
        return super().spec() | {"patch": self.patch_size}

    def length(self, pixels: Tensor) -> int:
        return 1 + (pixels.shape[2] // self.patch_size) * (pixels.shape[3] // self.patch_size)

    def expand(self, ops: Ops, x: Value) -> Value:
        first = ops.weight("cls.weight")
        tiles = ops("cast_like", ops("patches", x, size=self.patch_size), first)
        y = ops("prepend", ops.inline("patch", self.patch, tiles), first)
        return ops("add", y, ops.inline("position", self.position, ops("positions", ops.step)))

    def forward(self, pixels: Tensor, step: Step) -> Tensor:
        p = self.patch_size
        batch, channels, height, width = pixels.shape
        tiles = pixels.view(batch, channels, height // p, p, width // p, p)
        flat = tiles.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * p * p)
        x = self.patch(flat.to(self.cls.weight.dtype))
        first = self.cls.weight.expand(batch, 1, self.width)
        out: Tensor = torch.cat((first, x), 1) + self.position(step.positions)
        return out
