"""GroupedLinearSpec: the experts of a mixture on a GPU, routed, multiplied and joined without the host."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from effc.kernels.epilogue import ACTIVATIONS
from effc.kernels.kernel import KernelSpec
from effc.kernels.quant_linear.spec_gpu import WeightOnlySpec

PAIR = 64
"""Channels of gate that stand side by side, those of up behind them: one thread then holds both."""
BN = 2 * PAIR
"""Channels of a program."""


class GroupTile(BaseModel):
    """What one program computes, and how many share the columns of the second product."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bm: Literal[16, 32, 64, 128]
    """rows of one expert"""
    warps: Literal[4, 8]
    stages: int = Field(ge=1, le=8)
    split: int = Field(default=1, ge=1)
    """Programs that share the columns of the second; their float32 sums are added in order."""


TILES = (
    GroupTile(bm=16, warps=4, stages=4, split=2),
    GroupTile(bm=64, warps=8, stages=4),
    GroupTile(bm=128, warps=8, stages=3),
)
"""For few rows an expert, some and many; chosen by counts of registers and shared memory, not by time."""


class GroupedLinearSpec(KernelSpec, frozen=True):
    """y[m] = sum over k of weight (act(x Wg^T) * (x Wu^T)) Wd^T of the expert chosen; x and y bfloat16.

    Between the two products values are bfloat16; sums are float32, over experts in the order of `chosen`.
    """

    op: ClassVar[str] = "grouped_linear_gpu"
    version: ClassVar[int] = 1

    experts: int = Field(gt=0, le=1024)
    active: int = Field(gt=0, le=64)
    activation: str = "silu"
    renormalize: bool = True
    """Whether the weights of a row add up to one; of `choose` alone."""
    bits: Literal[2, 4, 8, 16] = 16
    """16: W is bfloat16"""
    group: int = Field(default=0, ge=0)
    """Columns that share a scale; 0 when the whole row does."""
    symmetric: bool = True
    scale: Literal["float16", "bfloat16"] = "float16"
    columns: Literal[64, 128] = 128
    """Columns of one turn of the loop, a field of the layout and of the order of sums."""
    tiles: tuple[GroupTile, ...] = Field(default=TILES, min_length=1)
    """By rows, the fewest first; without the widest where it would spill registers."""

    @model_validator(mode="before")
    @classmethod
    def _fitting(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "tiles" in given:
            return given
        wide = given.get("bits", 16) == 16
        if wide:  # columns of 64 leave room for stages
            return {"columns": 64} | given | {"tiles": TILES}
        return given | {"tiles": TILES[:2]}

    @model_validator(mode="after")
    def _possible(self) -> GroupedLinearSpec:
        if self.active > self.experts:
            raise ValueError(f"{self.active} active experts of {self.experts}")
        if self.activation not in ACTIVATIONS:
            there = ", ".join(sorted(ACTIVATIONS))
            raise ValueError(f"no activation is called {self.activation}; there are {there}")
        if self.bits == 16 and self.group:
            raise ValueError("weights of 16 bits have no groups")
        if list(self.tiles) != sorted(self.tiles, key=lambda tile: tile.bm):
            raise ValueError("tiles stand by rows, the fewest first")
        _ = self.packed  # says what its groups cannot be
        return self

    @property
    def packed(self) -> WeightOnlySpec | None:
        """The layout of one expert's matrix; None when it is bfloat16."""
        if self.bits == 16:
            return None
        fields = {name: getattr(self, name) for name in ("bits", "group", "symmetric", "scale", "columns")}
        return WeightOnlySpec.model_validate(fields)

    @property
    def sums(self) -> int:
        """Columns over which the products need sums of their rows; 0 for none."""
        return self.packed.run if self.packed and self.packed.sums else 0

    def bytes(self, width: int, hidden: int, chosen: int) -> int:
        """Bytes of the matrices of `chosen` experts, which is what a step must read."""
        if self.packed is None:
            return chosen * 3 * 2 * width * hidden
        return chosen * (self.packed.bytes(2 * hidden, width) + self.packed.bytes(width, hidden))


def refuses(spec: GroupedLinearSpec, m: int, width: int, hidden: int) -> str | None:
    """Why x [m, width] and experts with `hidden` between cannot take the kernel; None when they can."""
    step = max(spec.columns, spec.group)
    if width % step or hidden % step or hidden % PAIR:
        return f"widths {width} and {hidden} are not multiples of {max(step, PAIR)}"
    slots, most = m * spec.active, max(tile.split for tile in spec.tiles)
    if max(slots * hidden, most * slots * width, 2 * hidden * width) >= 2**31:
        return f"{slots} rows of {max(width, hidden)} need offsets beyond 31 bits"
    return None
