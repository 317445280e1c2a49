"""TwoOfFourSpec: y = epilogue(x W^T) on a GPU, W bfloat16 with two of every four columns stored."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from effc.kernels.epilogue import EPILOGUES
from effc.kernels.kernel import KernelSpec
from effc.kernels.quant_linear.spec_gpu import ROWS, Tile

COLUMNS = 128
"""of one turn of the loop"""
TURNS = 4
"""Turns that share the words of positions."""
TILES = (
    Tile(bm=16, bn=128, warps=8, stages=2, split=4),
    Tile(bm=64, bn=128, warps=8, stages=2),
)
"""For few rows and some, where reading W takes the time; chosen by counts of registers, not by time."""


class TwoOfFourSpec(KernelSpec, frozen=True):
    """x and W bfloat16, sums float32; of columns 4 q to 4 q + 3 of a row, two at most are not zero.

    Nine bits are read for a column where a dense row has sixteen. The unit for sparse products is not used:
    the kernel is for few rows, which wait for memory.
    """

    op: ClassVar[str] = "sparse_linear_gpu"
    version: ClassVar[int] = 1

    epilogue: tuple[str, ...] = ()
    tiles: tuple[Tile, ...] = Field(default=TILES, min_length=1)
    """By rows, the fewest first."""

    @model_validator(mode="after")
    def _possible(self) -> TwoOfFourSpec:
        unknown = [name for name in self.epilogue if name not in EPILOGUES]
        if unknown:
            raise ValueError(f"no epilogue is called {', '.join(unknown)}; there are {', '.join(EPILOGUES)}")
        if list(self.tiles) != sorted(self.tiles, key=lambda tile: tile.bm):
            raise ValueError("tiles stand by rows, the fewest first")
        return self

    def bytes(self, n: int, k: int) -> int:
        """Bytes of the packed matrix [n, k]."""
        return -(-n // ROWS) * ROWS * padded(k) * 9 // 8


def padded(k: int) -> int:
    """Columns that a row of k takes: whole words of positions."""
    return -(-k // (COLUMNS * TURNS)) * COLUMNS * TURNS


def refuses(spec: TwoOfFourSpec, m: int, n: int, k: int) -> str | None:
    """Why x [m, k] and W [n, k] cannot take the kernel; None when they can."""
    if k % COLUMNS:
        return f"K = {k} is not a multiple of {COLUMNS}"
    most = max(tile.split for tile in spec.tiles)
    if max(-(-n // ROWS) * ROWS * padded(k) // 4, m * k, most * m * n) >= 2**31:
        return f"x [{m}, {k}] and W [{n}, {k}] need offsets beyond 31 bits"
    return None
