"""BinaryPlanesGpuSpec: y = epilogue(x W^T) on a GPU, W a sum of planes of signs times scales."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from effc.kernels.epilogue import EPILOGUES
from effc.kernels.kernel import KernelSpec
from effc.kernels.quant_linear.spec_gpu import ROWS, Tile

TURN = 256
"""Columns of a turn of the loop: 8 words of a row of a plane."""
PLACE = 16
"""Columns of a turn that lie at one place of its words."""
TILES = (
    Tile(bm=16, bn=128, warps=4, stages=3, split=4),
    Tile(bm=32, bn=128, warps=4, stages=2),
)
NARROW = (
    Tile(bm=16, bn=64, warps=4, stages=3, split=4),
    Tile(bm=32, bn=64, warps=4, stages=2),
)
"""For few rows and for more; chosen by counts of instructions and registers, not by time. Sums of four planes
of 128 channels do not fit the registers, nor those of three with 64 rows."""


class BinaryPlanesGpuSpec(KernelSpec, frozen=True):
    """x and y bfloat16, sums float32, W [N, K] of `planes` bits a weight and its scales.

    side = rows: each row has scales of its own, shared by `share` columns (0: by all), on float32 sums.
    side = columns: each column has its own, shared by `share` rows (0: by all); they go into x, which is
    rounded to bfloat16 after, without loss where scales are powers of two.
    """

    op: ClassVar[str] = "binary_planes_gpu"
    version: ClassVar[int] = 1

    planes: int = Field(ge=1, le=4)
    side: Literal["columns", "rows"] = "rows"
    share: int = Field(default=0, ge=0)
    scale: Literal["float16", "bfloat16", "float32"] = "float16"
    """How scales are stored; each must be one of its numbers."""
    epilogue: tuple[str, ...] = ()
    tiles: tuple[Tile, ...] = Field(min_length=1)
    """By rows, the fewest first."""

    @model_validator(mode="before")
    @classmethod
    def _fitting(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        four = given.get("planes") == 4 and given.get("side", "rows") == "rows"
        return {"tiles": NARROW if four else TILES} | given

    @model_validator(mode="after")
    def _possible(self) -> BinaryPlanesGpuSpec:
        unknown = [name for name in self.epilogue if name not in EPILOGUES]
        if unknown:
            raise ValueError(f"no epilogue is called {', '.join(unknown)}; there are {', '.join(EPILOGUES)}")
        if self.side == "columns" and self.share % ROWS:
            raise ValueError(f"{self.share} rows share a scale; a multiple of {ROWS}, or 0 for all")
        if self.side == "rows" and (self.share % PLACE or (TURN % self.run or self.share % self.run)):
            raise ValueError(
                f"{self.share} columns share a scale; 16, 32, 64, 128, a multiple of {TURN}, or 0 for all"
            )
        if self.side == "rows" and self.planes * max(t.bn * t.bm // t.warps for t in self.tiles) > 3072:
            raise ValueError(f"sums of {self.planes} planes spill registers; tiles of fewer rows or channels")
        if list(self.tiles) != sorted(self.tiles, key=lambda tile: tile.bm):
            raise ValueError("tiles stand by rows, the fewest first")
        return self

    @property
    def run(self) -> int:
        """Columns of a turn whose products go into one sum."""
        return min(self.share, TURN) if self.side == "rows" and self.share else TURN

    def grid(self, n: int, k: int) -> tuple[int, int]:
        """A, B: runs of rows and of columns with scales of their own."""
        if self.side == "columns":
            return (n // self.share if self.share else 1), k
        return n, (k // self.share if self.share else 1)

    def bytes(self, n: int, k: int) -> int:
        """Bytes of the packed W [n, k]."""
        rows = -(-n // ROWS) * ROWS
        a, b = self.grid(rows if self.side == "rows" else n, k)
        return self.planes * (rows * k // 8 + a * b * (4 if self.scale == "float32" else 2))


def refuses(spec: BinaryPlanesGpuSpec, m: int, n: int, k: int) -> str | None:
    """Why x [m, k] and W [n, k] cannot take the kernel; None when they can."""
    if k % TURN:
        return f"K = {k} is not a multiple of {TURN}"
    whole, what = (n, "rows") if spec.side == "columns" else (k, "columns")
    if spec.share and whole % spec.share:
        return f"{spec.share} {what} that share a scale do not divide {whole}"
    rows, runs = -(-n // ROWS) * ROWS, spec.grid(n, k)[0] if spec.side == "columns" else 1
    most = max(tile.split for tile in spec.tiles)
    if max(spec.planes * rows * k // 8, runs * spec.planes * m * k, most * m * n) >= 2**31:
        return f"x [{m}, {k}] and W [{n}, {k}] need offsets beyond 31 bits"
    return None
