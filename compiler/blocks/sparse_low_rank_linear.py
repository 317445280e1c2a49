"""SparseLowRankLinear: a linear whose weight is a thin product plus numbers at scattered, fixed places.

Shapes: x [..., i], A [r, i], B [o, r], v [n] at places I [n] of the flattened W [o, i]; W = s B A + v at I.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effc.compiler.blocks.linear import dtype_name
from effc.compiler.blocks.unit import Unit, empty, empty_buffer

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value


def built(a: Tensor, b: Tensor, values: Tensor, places: Tensor, factor: float) -> Tensor:
    """s B A + v at I -> W [o, i] in the dtype of the factors; `places` hold no place twice"""
    w: Tensor = (b @ a).mul_(factor)
    w.view(-1).index_add_(0, places, values)
    return w


class SparseLowRankLinear(Unit):
    """y = x W^T + bias, W = s B A + v at I, s = alpha / rank: r (o + i) + n numbers that train.

    W is made for each pass, forward and backward, and not kept between: only x is held for the gradient.
    """

    a: nn.Parameter
    b: nn.Parameter
    values: nn.Parameter
    places: Tensor

    def __init__(
        self,
        *,
        in_features: int,
        out_features: int,
        rank: int,
        density: float,
        alpha: float,
        index: Literal["int32", "int64"] = "int32",
        bias: bool = False,
        dtype: str = "float32",
    ) -> None:
        """`density`: n is that share of o i, rounded down. `index`: how places are stored."""
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(f"rank {rank} is not in 1..{min(in_features, out_features)}")
        numbers = int(density * in_features * out_features)
        if not 1 <= numbers < in_features * out_features:
            raise ValueError(f"density {density:g} leaves {numbers} of {in_features * out_features} places")
        if index == "int32" and in_features * out_features >= 2**31:
            raise ValueError(f"{in_features * out_features} places need int64")
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.density = density
        self.alpha = alpha
        self.index = index
        self.a = empty(rank, in_features, dtype=dtype)
        self.b = empty(out_features, rank, dtype=dtype)
        self.values = empty(numbers, dtype=dtype)
        self.register_buffer("places", empty_buffer(numbers, dtype=index))
        self.register_parameter("bias", empty(out_features, dtype=dtype) if bias else None)

    @property
    def dtype(self) -> str:
        return dtype_name(self.a)

    @property
    def factor(self) -> float:
        """s"""
        return self.alpha / self.rank

    def spec(self) -> dict[str, Any]:
        return super().spec() | {"bias": self.bias is not None}

    def stored(self) -> Iterator[tuple[Tensor, int]]:
        """Places are no weights."""
        for tensor in (*self._parameters.values(), self.places):
            if tensor is not None:
                yield tensor, 0 if tensor is self.places else tensor.numel()

    def drawn(self, slot: str, dice: torch.Generator) -> Tensor | None:
        if slot != "places":
            return None
        return scattered(len(self.places), self.in_features * self.out_features, dice).to(self.places.dtype)

    def flops(self, mean: int) -> int:
        return 2 * self.in_features * self.out_features

    def dense(self) -> Tensor:
        """W [o, i], float64 where the factors are, else float32"""
        a, b, values = (t if t.element_size() == 8 else t.float() for t in (self.a, self.b, self.values))
        return built(a, b, values, self.places, self.factor)

    def expand(self, ops: Ops, x: Value) -> Value:
        parts = [ops.weight(name) for name in ("a", "b", "values", "places")]
        bias = ops.weight("bias") if self.bias is not None else None
        return ops("linear", x, ops("sparse_low_rank", *parts, factor=self.factor), bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self.a, self.b, self.values, self.places, self.factor)  # type: ignore[no-untyped-call]
        bias = cast("Tensor | None", self.bias)
        return y if bias is None else y + bias


def scattered(count: int, size: int, dice: torch.Generator) -> Tensor:
    """`count` different numbers below `size`, each set of them as likely, ascending [count] int64."""
    if 4 * count >= size:
        return torch.randperm(size, generator=dice)[:count].sort().values
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < count:
        found = torch.cat((found, torch.randint(0, size, (count + count // 8 + 8,), generator=dice))).unique()
    return found[torch.randperm(len(found), generator=dice)[:count]].sort().values


class _Product(torch.autograd.Function):
    """x W^T with gradients taken from G = dy^T x: dB = s G A^T, dA = s B^T G, dv = G at I, dx = dy W."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, values: Tensor, places: Tensor, factor: float
    ) -> Tensor:
        ctx.save_for_backward(x, a, b, values, places)
        ctx.factor = factor
        return F.linear(x, built(a, b, values, places, factor))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        dy: Tensor = grad_outputs[0]
        x, a, b, values, places = ctx.saved_tensors
        dx = dy @ built(a, b, values, places, ctx.factor) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:4]):
            return dx, None, None, None, None, None
        g = dy.flatten(0, -2).T @ x.flatten(0, -2)
        da, db = (b.T @ g).mul_(ctx.factor), (g @ a.T).mul_(ctx.factor)
        return dx, da, db, g.view(-1).index_select(0, places), None, None
