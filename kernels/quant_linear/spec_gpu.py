"""WeightOnlySpec: y = epilogue(x W^T) on a GPU, with x bfloat16 and W of 2 to 8 bits in groups along K."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from effc.kernels.epilogue import EPILOGUES
from effc.kernels.kernel import KernelSpec

ROWS = 128
"""Channels to which the packed matrix is filled up: the widest tile."""


class Tile(BaseModel):
    """What one program computes, and how many share the columns of x."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bm: int = Field(ge=16)
    """rows of x"""
    bn: Literal[64, 128]
    """channels: 64 at least, because W is the matrix instruction's first operand"""
    warps: Literal[4, 8]
    stages: int = Field(ge=1, le=8)
    split: int = Field(default=1, ge=1)
    """Programs that share the columns; their float32 sums are added in order by a second kernel."""

    @model_validator(mode="after")
    def _possible(self) -> Tile:
        if self.bm & (self.bm - 1):
            raise ValueError(f"a tile of {self.bm} rows; a power of two")
        if self.warps == 8 and self.bn != 128:
            raise ValueError("8 warps take 128 channels, 64 to every 4")
        return self


TILES = (
    Tile(bm=16, bn=128, warps=4, stages=4, split=4),
    Tile(bm=64, bn=128, warps=8, stages=4),
    Tile(bm=128, bn=128, warps=8, stages=3),
)
"""For few rows, some and many; chosen by counts of instructions and registers, not by time."""

MORE_OF_3 = Tile(bm=32, bn=128, warps=8, stages=3)
"""A plane of 3-bit codes has scales of its own, so that 64 rows would spill registers; where a row has one
scale, few rows beside 128 channels would."""


class WeightOnlySpec(KernelSpec, frozen=True):
    """W is (code - zero code) scale, codes unsigned of b bits; the zero code is 2^(b-1) when symmetric.

    Ten codes of 3 bits take a word, five in each half, so that they unpack in pairs as others do: 3.2 bits
    are stored for each, and rows are filled up to whole turns.
    """

    op: ClassVar[str] = "quant_linear_a16"
    version: ClassVar[int] = 1

    bits: Literal[2, 3, 4, 8]
    group: int = Field(ge=0)
    """Columns that share a scale; 0 when the whole row does."""
    symmetric: bool = True
    scale: Literal["float16", "bfloat16"] = "float16"
    columns: Literal[64, 128, 160, 320, 640] = 128
    """Columns of one turn of the loop, a field of the layout and of the order of sums."""
    extension: Literal[0, 16, 32, 64, 128] = 0
    """Columns that follow those of W in bfloat16: an adapter of this rank, or several side by side. The sum
    begins with W x and goes on with outer inner, inner [M, R] being (scale A x) and outer [N', R] B."""
    within: bool = False
    """Whether the kernel makes inner itself from A [R, K], each program over its own columns: no kernel
    before, for A read by every program. Inner is float32 then, and multiplied as two bfloat16 numbers."""
    epilogue: tuple[str, ...] = ()
    tiles: tuple[Tile, ...] = Field(default=TILES, min_length=1)
    """By rows, the fewest first; without the widest where runs are short, which would spill registers."""

    @model_validator(mode="before")
    @classmethod
    def _fitting(cls, given: Any) -> Any:
        three = isinstance(given, dict) and given.get("bits") == 3
        given = {"columns": 320} | given if three else given
        if not isinstance(given, dict) or "tiles" in given:
            return given
        if three:
            few = Tile(bm=16, bn=128 if given.get("group") else 64, warps=4, stages=4, split=4)
            return given | {"tiles": (few, MORE_OF_3)}
        short = 0 < (given.get("group") or 0) < 128 or given.get("columns") == 64
        return given | {"tiles": TILES[:2] if short else TILES}

    @model_validator(mode="after")
    def _possible(self) -> WeightOnlySpec:
        unknown = [name for name in self.epilogue if name not in EPILOGUES]
        if unknown:
            raise ValueError(f"no epilogue is called {', '.join(unknown)}; there are {', '.join(EPILOGUES)}")
        if (self.bits == 3) != (self.columns > 128):
            raise ValueError(f"{self.columns} columns a turn; 160, 320 or 640 with 3 bits, else 64 or 128")
        if self.within and self.extension not in (16, 32, 64):
            raise ValueError(f"inner of {self.extension} columns is not made within the kernel; 16, 32 or 64")
        if self.plane < 16:
            raise ValueError(f"{self.columns} columns of {self.bits} bits a turn; the dot product needs 128")
        if self.group % self.run or self.columns % self.run or self.run % self.plane:
            raise ValueError(
                f"groups of {self.group} columns in turns of {self.columns} at {self.bits} bits; "
                f"a group is a multiple of {self.plane} that divides, or is a multiple of, a turn"
            )
        if self.run < 128 and any(tile.bm > 64 for tile in self.tiles):
            raise ValueError(f"128 rows with runs of {self.run} columns spill registers; at most 64")
        if self.bits == 3 and any(tile.bm > 32 for tile in self.tiles):
            raise ValueError("more than 32 rows with 3 bits spill registers")
        if list(self.tiles) != sorted(self.tiles, key=lambda tile: tile.bm):
            raise ValueError("tiles stand by rows, the fewest first")
        return self

    @property
    def planes(self) -> int:
        """Codes in each half of a word."""
        return 16 // self.bits

    @property
    def plane(self) -> int:
        """Columns of a turn that lie at one place of its words."""
        return self.columns // self.planes

    @property
    def run(self) -> int:
        """Columns that share one scale within a turn; `xsum` has a row for each run."""
        return self.plane if self.bits == 3 else min(self.group or self.columns, self.columns)

    @property
    def each(self) -> int:
        """Codes in a word."""
        return 2 * self.planes

    def padded(self, k: int) -> int:
        """Columns that a row of k takes: with 3 bits whole turns."""
        return -(-k // self.columns) * self.columns

    @property
    def mid(self) -> int:
        """The code that stands for zero when symmetric."""
        return 1 << (self.bits - 1)

    @property
    def offset(self) -> int:
        """What the matrix instruction sees is code + offset, which bfloat16 holds exactly."""
        return -128 if self.bits == 8 else 128

    @property
    def sums(self) -> bool:
        """Whether the kernel needs the sums of x over every run: not when zero is seen as zero."""
        return not (self.symmetric and self.mid + self.offset == 0)

    def groups(self, k: int) -> int:
        """Groups in a row of k columns."""
        return -(-k // self.group) if self.group else 1

    def bytes(self, n: int, k: int) -> int:
        """Bytes of the packed matrix [n, k]."""
        rows = -(-n // ROWS) * ROWS
        return rows * (self.padded(k) // self.each * 4 + self.groups(k) * (2 if self.symmetric else 3))


def refuses(spec: WeightOnlySpec, m: int, n: int, k: int) -> str | None:
    """Why x [m, k] and W [n, k] cannot take the kernel; None when they can."""
    step = spec.run if spec.bits == 3 else spec.columns
    if k % step or (spec.group and k % spec.group):
        return f"K = {k} is not a multiple of {max(step, spec.group)}"
    rows = -(-n // ROWS) * ROWS
    most = max(tile.split for tile in spec.tiles)
    if max(rows * spec.padded(k) // spec.each, m * k, most * m * n) >= 2**31:
        return f"x [{m}, {k}] and W [{n}, {k}] need offsets beyond 31 bits"
    return None
