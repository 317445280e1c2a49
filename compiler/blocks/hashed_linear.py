"""HashedLinear: a linear whose weights are read, with signs and a factor, from an array that many share.

Shapes: x [..., i], array p [m], W [o, i]; weight number f of the concatenation of all matrices that share
the array is W_f = factor * sign(f) * p[h(f)].
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effc.compiler.blocks.linear import dtype_name
from effc.compiler.blocks.unit import Unit, empty, empty_buffer

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value

Mapping = Literal["random_fold", "roast"]
_MASK = (1 << 31) - 1


def mixed(x: Tensor, seed: int) -> Tensor:
    """Numbers [...] int64 -> hashes below 2^31 by shifts and products of 64 bits, alike on every device."""
    h = x + (seed * 0x9E3779B1 + 0x7F4A7C15)
    for by in (0x2C1B3C6D, 0x297A2D39):
        h = ((h ^ (h >> 15) & _MASK) * by) & 0x7FFFFFFFFFFFFFF
        h = h ^ (h >> 29)
    return (h ^ (h >> 17)) & _MASK


def where(first: int, count: int, slots: int, mapping: Mapping, chunk: int, seed: int) -> Tensor:
    """h of weights `first` to `first + count` [count] int64.

    random_fold: every run of `slots` weights lies once around the array, from a place of its own, so that no
    slot serves more than one weight more than another. roast: every `chunk` weights lie together anywhere.
    """
    f = torch.arange(first, first + count)
    if mapping == "random_fold":
        return (mixed(f // slots, seed) + f % slots) % slots
    return mixed(f // chunk, seed) % (slots - chunk + 1) + f % chunk


def signs(first: int, count: int, seed: int) -> Tensor:
    """1 or -1 of weights `first` to `first + count` [count] int8"""
    return (2 * (mixed(torch.arange(first, first + count), seed + 1) >> 7 & 1) - 1).to(torch.int8)


@lru_cache(maxsize=4)
def loads(
    ends: tuple[int, ...], scales: tuple[float, ...], slots: int, mapping: Mapping, chunk: int, seed: int
) -> Tensor:
    """Sum of the squared factors of all weights that a slot serves [m] float32; 1 where it serves none."""
    total, start = torch.zeros(slots, dtype=torch.float64), 0
    for end, scale in zip(ends, scales, strict=True):
        for first in range(start, end, 1 << 24):
            count = min(end, first + (1 << 24)) - first
            total.index_add_(
                0,
                where(first, count, slots, mapping, chunk, seed),
                torch.full((count,), scale**2, dtype=torch.float64),
            )
        start = end
    return torch.where(total > 0, total, 1.0).float()


class HashedLinear(Unit):
    """y = x W^T + bias, W read from the array for each pass; the array is one parameter of all that share it.

    `scales` [K] and `ends` [K] say the factors of the K matrices that share the array and where each ends
    among all weights; this one is number `number` and begins at fold * slots + offset. `grad_scale = v1`: the
    gradient of a slot is divided by the sum of the squared factors of what it serves, so that weights move
    like the mean of their own gradients whatever the array's first deviation is.
    """

    pool: nn.Parameter
    scales: Tensor
    ends: Tensor

    def __init__(
        self,
        *,
        in_features: int,
        out_features: int,
        slots: int,
        matrices: int,
        number: int,
        fold: int,
        offset: int,
        mapping: Mapping = "random_fold",
        chunk: int = 64,
        grad_scale: Literal["none", "v1"] = "v1",
        seed: int = 0,
        bias: bool = False,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        if not 0 <= offset < slots:
            raise ValueError(f"offset {offset} is not below {slots} slots")
        if not 0 <= number < matrices:
            raise ValueError(f"number {number} is not below {matrices} matrices")
        if mapping == "roast" and not 1 <= chunk <= slots:
            raise ValueError(f"chunks of {chunk} do not fit in {slots} slots")
        self.in_features = in_features
        self.out_features = out_features
        self.slots = slots
        self.matrices = matrices
        self.number = number
        self.fold = fold
        self.offset = offset
        self.mapping: Mapping = mapping
        self.chunk = chunk
        self.grad_scale = grad_scale
        self.seed = seed
        self.pool = empty(slots, dtype=dtype)
        self.register_buffer("scales", empty_buffer(matrices, dtype="float32"))
        self.register_buffer("ends", empty_buffer(matrices, dtype="int64"))
        self.register_parameter("bias", empty(out_features, dtype=dtype) if bias else None)

    @property
    def dtype(self) -> str:
        return dtype_name(self.pool)

    @property
    def first(self) -> int:
        """The number of the first weight among all that share the array."""
        return self.fold * self.slots + self.offset

    def spec(self) -> dict[str, Any]:
        return super().spec() | {"bias": self.bias is not None}

    def stored(self) -> Iterator[tuple[Tensor, int]]:
        """Factors and ends are no weights."""
        yield self.pool, self.pool.numel()
        yield self.scales, 0
        yield self.ends, 0
        if (bias := self._parameters.get("bias")) is not None:
            yield bias, bias.numel()

    def flops(self, mean: int) -> int:
        return 2 * self.in_features * self.out_features

    def map(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """h and signs of the weights, row by row."""
        count = self.in_features * self.out_features
        h = where(self.first, count, self.slots, self.mapping, self.chunk, self.seed)
        return h.to(device), signs(self.first, count, self.seed).to(device)

    def load(self) -> Tensor | None:
        """What gradients of slots are divided by [m]; None without scaling."""
        if self.grad_scale == "none":
            return None
        ends, scales = tuple(self.ends.tolist()), tuple(self.scales.tolist())
        found = loads(ends, scales, self.slots, self.mapping, self.chunk, self.seed)
        return found.to(self.pool.device)

    def dense(self) -> Tensor:
        """W [o, i], float64 where the array is, else float32"""
        pool = self.pool if self.pool.element_size() == 8 else self.pool.float()
        return laid(pool, self.scales[self.number], *self.map(pool.device), self.out_features)

    def expand(self, ops: Ops, x: Value) -> Value:
        weight = ops(
            "hashed", ops.weight("pool"), ops.weight("scales"), number=self.number, rows=self.out_features,
            columns=self.in_features, first=self.first, mapping=self.mapping, chunk=self.chunk,
            seed=self.seed,
        )  # fmt: skip
        return ops("linear", x, weight, ops.weight("bias") if self.bias is not None else None)

    def forward(self, x: Tensor) -> Tensor:
        w = cast(Tensor, _Read.apply(self.pool, self))  # type: ignore[no-untyped-call]
        return F.linear(x, w, cast("Tensor | None", self.bias))


def laid(pool: Tensor, scale: Tensor, h: Tensor, sign: Tensor, rows: int) -> Tensor:
    """W [rows, i] = scale * sign * pool[h], in the array's dtype"""
    return (pool[h] * (sign * scale).to(pool.dtype)).view(rows, -1)


class _Read(torch.autograd.Function):
    """W from the array; its gradient adds up over the weights that a slot serves."""

    @staticmethod
    def forward(ctx: Any, pool: Tensor, unit: HashedLinear) -> Tensor:
        ctx.unit, ctx.kind = unit, pool.dtype
        return laid(pool, unit.scales[unit.number], *unit.map(pool.device), unit.out_features)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        dw: Tensor = grad_outputs[0]
        unit: HashedLinear = ctx.unit
        h, sign = unit.map(dw.device)
        wide = torch.promote_types(dw.dtype, torch.float32)
        each = dw.flatten().to(wide) * (sign * unit.scales[unit.number]).to(wide)
        total = torch.zeros(unit.slots, dtype=wide, device=dw.device).index_add_(0, h, each)
        if (load := unit.load()) is not None:
            total /= load.to(wide)
        return total.to(ctx.kind), None
