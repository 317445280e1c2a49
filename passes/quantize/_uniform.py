"""What all uniform integer quantizers share: fields, refusals, the packed unit in a weight's place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Annotated, ClassVar, Literal, Self, cast

import torch
from annotated_types import Gt
from pydantic import Field
from torch import Tensor, nn

from effc.compiler.blocks.embedding import Embedding
from effc.compiler.blocks.linear import Linear, StackedLinear
from effc.compiler.blocks.lora_linear import LoraLinear
from effc.compiler.blocks.quant_linear import WHOLE, QuantEmbedding, QuantLinear, QuantStackedLinear
from effc.compiler.blocks.unit import DTYPES, Unit
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.selects import Selects
from effc.passes._dense import divisors_near, inputs_of, not_dense, shared, some
from effc.passes.quantize._grid import Find, decode, encode
from effc.specs.diagnostic import Diagnostic

_SCALES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


class Uniform(Selects):
    """Fields and refusals of a quantizer onto uniform integer grids."""

    overrides: ClassVar[tuple[str, ...]] = ("bits", "group", "scheme", "scale")

    group: Annotated[int, Gt(0)] | Literal["channel", "tensor"] = Field(
        default="channel", description="inputs that share a scale; `channel`: a row, `tensor`: all weights"
    )
    scheme: Literal["symmetric", "asymmetric"] = Field(
        default="symmetric", description="whether zero is the middle of the grid or has a code of its own"
    )
    scale: Literal["fp16", "bf16", "fp32"] = Field(default="fp16", description="how scales are stored")

    @property
    def store(self) -> torch.dtype:
        dtype: torch.dtype = DTYPES[_SCALES[self.scale]]
        return dtype

    def width(self, bits: int, inputs: int) -> dict[str, object]:
        """The grid arguments of a packed unit with this many inputs."""
        group = {"channel": inputs, "tensor": WHOLE}.get(str(self.group), self.group)
        return {
            "bits": bits,
            "group": group,
            "symmetric": self.scheme == "symmetric",
            "scale_dtype": _SCALES[self.scale],
        }

    def targets(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model: Model
    ) -> dict[str, Self]:
        """As `Selects` has them; what layers share beneath differences of their own in place of these."""
        held = shared(model)
        return {_beneath(model, path, held): method for path, method in super().targets(model).items()}

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        targets = self.targets(model)
        return [*self._unfit(model, targets), *not_dense(self.kind, "quantize", model, targets)]

    def _unfit(self, model: Model, targets: Mapping[str, Uniform]) -> Iterator[Diagnostic]:
        """One diagnostic for each group that does not divide, with those that divide all its inputs."""
        widths: dict[int, dict[int, list[str]]] = {}
        for path, method in targets.items():
            inputs = inputs_of(model.module(path))
            if isinstance(method.group, int) and inputs:
                widths.setdefault(method.group, {}).setdefault(inputs, []).append(path)
        for group, found in widths.items():
            odd = {inputs: paths for inputs, paths in found.items() if inputs % group}
            if odd:
                first, *others = odd
                near = ", ".join(map(str, divisors_near(group, found)))
                yield Diagnostic(
                    "E321",
                    f"group {group} does not divide in_features {first} of {some(odd[first])}",
                    notes=tuple(f"nor {inputs} of {some(odd[inputs])}" for inputs in others),
                    help=f"use {near} or channel" if near else "use channel",
                    about="group",
                )


def _beneath(model: Model, path: str, held: Set[str]) -> str:
    """The path of the shared dense matrix that an adapter is beside, else the path itself."""
    unit = model.module(path)
    alone = (
        not isinstance(unit, LoraLinear) or not isinstance(unit.base, Linear) or f"{path}.base" not in held
    )
    return path if alone else f"{path}.base"


PackedUnit = QuantLinear | QuantStackedLinear | QuantEmbedding

CHUNK = 1 << 20
"""Weights that are rounded at once; bounds the memory beyond the model itself."""


def packed_unit(module: nn.Module, grid: dict[str, object]) -> PackedUnit:
    """An empty packed unit that can take the place of a dense module; it keeps children and bias."""
    if isinstance(module, Embedding):
        table = Unit.from_spec(module.spec() | grid | {"type": "QuantEmbedding"})
        for name, child in module.named_children():
            table.add_module(name, child)
        return cast(QuantEmbedding, table)
    dtype = str(module.get_parameter("weight").dtype).removeprefix("torch.")
    sides = {"in_features": module.in_features, "out_features": module.out_features, "dtype": dtype}
    if isinstance(module, StackedLinear):
        stack = {"type": "QuantStackedLinear", "experts": module.experts}
        return cast(QuantStackedLinear, Unit.from_spec(stack | sides | grid))
    bias = cast("nn.Parameter | None", module.bias)
    linear = Unit.from_spec({"type": "QuantLinear", "bias": bias is not None} | sides | grid)
    linear.register_parameter("bias", bias)
    return cast(QuantLinear, linear)


def nearest(
    w: Tensor, bits: int, groups: int, symmetric: bool, store: torch.dtype, find: Find
) -> tuple[Tensor, Tensor, Tensor, float]:
    """w [R, i] -> q [R, i] int8, scale and zero [R, G] float32, and ||w - w'|| / ||w||; in blocks of rows."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    squares = total = 0.0
    for rows in w.split(max(1, CHUNK // w.shape[1])):
        wide = rows.float().view(rows.shape[0], groups, -1)
        scale, zero = find(wide, bits, symmetric, store)
        q = encode(wide, scale, zero, bits)
        squares += float((decode(q, scale, zero) - wide).square().sum(dtype=torch.float64))
        total += float(wide.square().sum(dtype=torch.float64))
        parts.append((q.to(torch.int8).view_as(rows), scale, zero))
    q, scale, zero = (torch.cat(part) for part in zip(*parts, strict=True))
    return q, scale, zero, math.sqrt(squares / total) if total else 0.0


def place(rw: Rewriter, path: str, unit: PackedUnit, ties: Mapping[str, str]) -> set[str]:
    """Put the packed unit at a path, and units on the same storage wherever the old weight was tied.

    `ties` are those of the model with its dense weights. Returns every path that was edited.
    """
    name = f"{path}.weight"
    owner = ties.get(name, name)
    tied = (n for n in (owner, *(alias for alias, to in ties.items() if to == owner)) if n != name)
    twins = [n.removesuffix(".weight") for n in tied]
    for twin in twins:
        grid = {key: getattr(unit, key) for key in ("bits", "group", "symmetric", "scale_dtype")}
        other = packed_unit(rw.module(twin), grid)
        other.packed, other.scales, other.zeros = unit.packed, unit.scales, unit.zeros
        rw.swap(twin, other)
    rw.swap(path, unit)
    return {path, *twins}
