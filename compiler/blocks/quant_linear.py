"""Units whose weights are packed integers: QuantLinear, QuantStackedLinear, QuantEmbedding.

Shapes: W [R, i], R rows (out features, experts times out features, or vocabulary), i inputs, G groups of g
inputs a row. A weight is w = scale (q - zero), with q and zero signed integers of b bits.

Stored: packed [R, ceil(i b / 8)] uint8 holds q + 2^(b-1) as a little-endian bit stream (compiler/packing.py);
scales [R, G] half precision; zeros [ceil(R G b / 8)] uint8, packed the same way over all rows, absent when
symmetric. One scale for the whole tensor has shape [1, 1]. Bytes: R ceil(i b / 8) + 2 R G (+ ceil(R G b /
8)).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effc.compiler.blocks.embedding import Embedding
from effc.compiler.blocks.unit import DTYPES, Unit, empty, empty_buffer
from effc.compiler.packing import pack, packed_bytes, unpack

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value

ScaleDtype = Literal["float16", "bfloat16", "float32"]
WHOLE = 0
"""The group size that means: one scale for the whole tensor."""


class Packed(nn.Module):
    """The storage all three share; `rows` and `in_features` are the two sides of the matrix."""

    rows: int
    in_features: int
    bits: int
    group: int
    symmetric: bool
    scale_dtype: str
    packed: Tensor
    scales: Tensor
    zeros: Tensor | None

    def _store(self, rows: int) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"{self.bits} bits; a packed weight has 1 to 8")
        if self.group != WHOLE and self.in_features % self.group:
            raise ValueError(f"group {self.group} does not divide in_features {self.in_features}")
        self.rows = rows
        lines, groups = self.grid
        zeros = (
            None if self.symmetric else empty_buffer(packed_bytes(lines * groups, self.bits), dtype="uint8")
        )
        self.register_buffer(
            "packed", empty_buffer(rows, packed_bytes(self.in_features, self.bits), dtype="uint8")
        )
        self.register_buffer("scales", empty_buffer(lines, groups, dtype=self.scale_dtype))
        self.register_buffer("zeros", zeros)

    @property
    def grid(self) -> tuple[int, int]:
        """The shape [R, G] of scales and zero points; [1, 1] when one serves the whole tensor."""
        return (1, 1) if self.group == WHOLE else (self.rows, self.in_features // self.group)

    def fill(self, q: Tensor, scale: Tensor, zero: Tensor | None) -> None:
        """Store q [R, i] int8, scale [R, G] and zero [R, G] int8 (None when symmetric)."""
        self.packed = pack(self._codes(q), self.bits)
        self.scales = scale.to(DTYPES[self.scale_dtype]).reshape(self.grid).clone()
        if zero is not None:
            self.zeros = pack(self._codes(zero).reshape(1, -1), self.bits).flatten()

    def unpack(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """-> q [R, i] int8, scale [R, G] as stored, zero [R, G] int8 or None when symmetric."""
        return self._signed(unpack(self.packed, self.bits, self.in_features)), self.scales, self._zero()

    def dense(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """The weights of some rows, float32 [n, i]."""
        q = self._signed(unpack(self.packed[rows], self.bits, self.in_features)).float()
        zero = self._zero()
        lines = slice(None) if self.group == WHOLE else rows
        wide = q.view(q.shape[0], self.grid[1], -1)
        if zero is not None:
            wide = wide - zero[lines].float().unsqueeze(-1)
        return (wide * self.scales[lines].float().unsqueeze(-1)).view_as(q)

    def stored(self) -> Iterator[tuple[Tensor, int]]:
        """Own tensors, each with the number of logical weights it stands for."""
        yield self.packed, self.rows * self.in_features
        for part in (self.scales, self.zeros):
            if part is not None:
                yield part, 0
        bias = self._parameters.get("bias")
        if bias is not None:
            yield bias, bias.numel()

    def expand_dense(self, ops: Ops) -> Value:
        """The weights [R, i] float32 as a value."""
        parts = [ops.weight("packed"), ops.weight("scales")]
        parts += [ops.weight("zeros")] if self.zeros is not None else []
        return ops("dequantize", *parts, bits=self.bits, columns=self.in_features)

    def _zero(self) -> Tensor | None:
        if self.zeros is None:
            return None
        lines, groups = self.grid
        return self._signed(unpack(self.zeros.unsqueeze(0), self.bits, lines * groups)).view(lines, groups)

    def _codes(self, q: Tensor) -> Tensor:
        return (q.to(torch.int16) + (1 << (self.bits - 1))).to(torch.uint8)

    def _signed(self, codes: Tensor) -> Tensor:
        return (codes.to(torch.int16) - (1 << (self.bits - 1))).to(torch.int8)


class QuantLinear(Packed, Unit):
    """y = x W^T + b with W [out_features, in_features] packed; computed in the dtype of x."""

    def __init__(
        self,
        *,
        in_features: int,
        out_features: int,
        bits: int,
        group: int,
        symmetric: bool = True,
        scale_dtype: ScaleDtype = "float16",
        bias: bool = False,
        dtype: str = "float32",
    ) -> None:
        """`group` inputs share a scale; 0: one scale for the whole tensor. `dtype` is that of the bias."""
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        self.group = group
        self.symmetric = symmetric
        self.scale_dtype = scale_dtype
        self.dtype = dtype
        self._store(out_features)
        self.register_parameter("bias", empty(out_features, dtype=dtype) if bias else None)

    def spec(self) -> dict[str, Any]:
        return super().spec() | {"bias": self.bias is not None}

    def flops(self, mean: int) -> int:
        return 2 * self.in_features * self.out_features

    def expand(self, ops: Ops, x: Value) -> Value:
        weight = ops("cast_like", self.expand_dense(ops), x)
        return ops("linear", x, weight, ops.weight("bias") if self.bias is not None else None)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense().to(x.dtype), cast("Tensor | None", self.bias))


class QuantStackedLinear(Packed, Unit):
    """E packed linears of one shape; the rows of expert e are e * out_features and on."""

    def __init__(
        self,
        *,
        experts: int,
        in_features: int,
        out_features: int,
        bits: int,
        group: int,
        symmetric: bool = True,
        scale_dtype: ScaleDtype = "float16",
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        self.experts = experts
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        self.group = group
        self.symmetric = symmetric
        self.scale_dtype = scale_dtype
        self.dtype = dtype
        self._store(experts * out_features)

    def expand_stack(self, ops: Ops) -> Value:
        """The weights [E, o, i] as a value."""
        return ops("stack", self.expand_dense(ops), experts=self.experts)

    def matrix(self, expert: int) -> Tensor:
        """The weight [o, i] of one expert, float32."""
        return self.dense(slice(expert * self.out_features, (expert + 1) * self.out_features))

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """x [N, i] through one expert -> [N, o]."""
        return F.linear(x, self.matrix(expert).to(x.dtype))


class QuantEmbedding(Packed, Embedding):
    """An Embedding whose table is packed; only the rows that are looked up are unpacked."""

    def __init__(
        self,
        *,
        vocab: int,
        width: int,
        bits: int,
        group: int,
        symmetric: bool = True,
        scale_dtype: ScaleDtype = "float16",
        scale: float = 1.0,
        positions: int = 0,
        position_offset: int = 0,
        types: int = 0,
        norm_eps: float = 0.0,
        count_padding: bool = False,
        dtype: str = "float32",
    ) -> None:
        """`dtype` is that of the vectors that come out; the rest as in QuantLinear and Embedding."""
        Embedding.__init__(
            self,
            vocab=vocab,
            width=width,
            scale=scale,
            positions=positions,
            position_offset=position_offset,
            types=types,
            norm_eps=norm_eps,
            count_padding=count_padding,
            dtype=dtype,
        )
        self.in_features = width
        self.bits = bits
        self.group = group
        self.symmetric = symmetric
        self.scale_dtype = scale_dtype
        self._dtype = dtype
        self._store(vocab)

    def _tables(self, dtype: str) -> None:
        """No float table: the packed one is made once the bits are known."""

    @property
    def dtype(self) -> str:
        return self._dtype

    def expand_lookup(self, ops: Ops, ids: Value) -> Value:
        return ops("cast_to", ops("embed", ids, self.expand_dense(ops)), dtype=self._dtype)

    def lookup(self, ids: Tensor) -> Tensor:
        return self.dense(ids.flatten()).to(DTYPES[self._dtype]).view(*ids.shape, self.width)
