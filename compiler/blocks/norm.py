"""Norm: RMS or layer normalisation over the last dimension, with an optional offset of the gain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effc.compiler.blocks.linear import dtype_name
from effc.compiler.blocks.unit import Unit, empty

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value


class Norm(Unit):
    """y = n(x) (offset + w) + b. rms: n(x) = x / sqrt(mean(x^2) + eps); layer: the mean is removed first.

    `offset` is 1 where a checkpoint stores the gain minus one (gemma). Half precision is computed in
    float32 and cast back: a gain with an offset before that cast (as gemma does), another after it.
    """

    weight: nn.Parameter

    def __init__(
        self,
        *,
        width: int,
        eps: float = 1e-6,
        form: Literal["rms", "layer"] = "rms",
        bias: bool = False,
        offset: float = 0.0,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        self.width = width
        self.eps = eps
        self.form = form
        self.offset = offset
        self.weight = empty(width, dtype=dtype)
        self.register_parameter("bias", empty(width, dtype=dtype) if bias else None)

    @property
    def dtype(self) -> str:
        return dtype_name(self.weight)

    def spec(self) -> dict[str, Any]:
        return super().spec() | {"bias": self.bias is not None}

    def expand(self, ops: Ops, x: Value) -> Value:
        bias = ops.weight("bias") if self.bias is not None else None
        return ops(f"{self.form}_norm", x, ops.weight("weight"), bias, eps=self.eps, offset=self.offset)

    def forward(self, x: Tensor) -> Tensor:
        bias = cast(Tensor | None, self.bias)
        if self.form == "layer":
            gain = self.weight + self.offset if self.offset else self.weight
            return F.layer_norm(x, (self.width,), gain, bias, self.eps)
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        n = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.offset:
            y = (n * (self.weight.to(n.dtype) + self.offset)).to(x.dtype)
        else:
            y = n.to(x.dtype) * self.weight
        return y if bias is None else y + bias
