"""ByteLinearSpec: y = epilogue(x W^T) with x of one byte, a scale to each row, and W of 4 or 8 bits."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from effc.kernels.epilogue import EPILOGUES
from effc.kernels.kernel import KernelSpec
from effc.kernels.quant_linear.spec_gpu import ROWS, Tile

Kind = Literal["int8", "float8"]

LARGEST: dict[Kind, float] = {"int8": 127.0, "float8": 448.0}
"""What the largest magnitude of a row becomes; float8 is e4m3 without infinities."""

TILES = (
    Tile(bm=16, bn=128, warps=4, stages=4, split=4),
    Tile(bm=64, bn=128, warps=8, stages=4),
    Tile(bm=128, bn=128, warps=8, stages=4),
)
"""For few rows, some and many; chosen by counts of instructions and registers, not by time."""


class ByteLinearSpec(KernelSpec, frozen=True):
    """W is code scale with codes of 8 bits of x's kind, or (code - zero code) scale with codes of 4 bits.

    With int8 and one scale a channel, sums over all of K are exact: int32. Else the sums over a run of
    columns are (in float8 as exact as the matrix unit adds), and their scaled sums float32.
    """

    op: ClassVar[str] = "byte_linear"
    version: ClassVar[int] = 1

    kind: Kind = "int8"
    bits: Literal[4, 8] = 8
    group: int = Field(default=0, ge=0)
    """Columns that share a scale of W; 0 when the whole row does."""
    symmetric: bool = True
    """The zero code is 8; else each group has its own."""
    scale: Literal["float16", "bfloat16", "float32"] = "float32"
    columns: Literal[64, 128] = 128
    """Columns of one turn of the loop, a field of the layout and of the order of sums."""
    epilogue: tuple[str, ...] = ()
    tiles: tuple[Tile, ...] = Field(default=TILES, min_length=1)
    """By rows, the fewest first; without the widest where it would spill registers."""

    @model_validator(mode="before")
    @classmethod
    def _fitting(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "tiles" in given:
            return given
        short = 0 < (given.get("group") or 0) < 128 or given.get("columns") == 64
        return given | {"tiles": TILES[:2] if short or not given.get("symmetric", True) else TILES}

    @model_validator(mode="after")
    def _possible(self) -> ByteLinearSpec:
        unknown = [name for name in self.epilogue if name not in EPILOGUES]
        if unknown:
            raise ValueError(f"no epilogue is called {', '.join(unknown)}; there are {', '.join(EPILOGUES)}")
        if self.bits == 4 and self.kind != "int8":
            raise ValueError("codes of 4 bits multiply int8 alone")
        if self.bits == 8 and not self.symmetric:
            raise ValueError("codes of 8 bits have no zero codes")
        if self.group % self.run or self.columns % self.run or self.run % self.plane:
            raise ValueError(
                f"groups of {self.group} columns in turns of {self.columns} at {self.bits} bits; "
                f"a group is a multiple of {self.plane} that divides, or is a multiple of, a turn"
            )
        if (self.run < 128 or not self.symmetric) and any(tile.bm > 64 for tile in self.tiles):
            raise ValueError(
                f"128 rows with runs of {self.run} columns or zero codes spill registers; at most 64"
            )
        if list(self.tiles) != sorted(self.tiles, key=lambda tile: tile.bm):
            raise ValueError("tiles stand by rows, the fewest first")
        return self

    @property
    def plane(self) -> int:
        """Columns of a turn that go into one product."""
        return self.columns // (8 // self.bits)

    @property
    def run(self) -> int:
        """Columns that share one scale within a turn."""
        return min(self.group or self.columns, self.columns)

    @property
    def exact(self) -> bool:
        """Whether one int32 sum goes over all columns."""
        return self.kind == "int8" and not self.group and self.symmetric

    @property
    def sums(self) -> bool:
        """Whether the kernel needs the sums of x over every run."""
        return not self.symmetric

    def groups(self, k: int) -> int:
        """Groups in a row of k columns."""
        return k // self.group if self.group else 1

    def bytes(self, n: int, k: int) -> int:
        """Bytes of the packed matrix [n, k]."""
        rows = -(-n // ROWS) * ROWS
        each = (4 if self.scale == "float32" else 2) + (0 if self.symmetric else 1)
        return rows * (k * self.bits // 8 + self.groups(k) * each)


def refuses(spec: ByteLinearSpec, m: int, n: int, k: int) -> str | None:
    """Why x [m, k] and W [n, k] cannot take the kernel; None when they can."""
    if k % spec.columns or (spec.group and k % spec.group):
        return f"K = {k} is not a multiple of {max(spec.columns, spec.group)}"
    rows = -(-n // ROWS) * ROWS
    most = max(tile.split for tile in spec.tiles)
    if max(rows * k * spec.bits // (32 if spec.bits == 4 else 8), m * k, most * m * n) >= 2**31:
        return f"x [{m}, {k}] and W [{n}, {k}] need offsets beyond 31 bits"
    if spec.kind == "int8" and 127 * 128 * k >= 2**31:
        return f"sums of {k} products of bytes do not fit 32 bits"
    return None
