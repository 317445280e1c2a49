"""BitmapSpec: y = epilogue(x W^T) on a GPU, W with zeros anywhere: a bit for each weight, and the others."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from effc.kernels.epilogue import EPILOGUES
from effc.kernels.kernel import KernelSpec
from effc.kernels.quant_linear.spec_gpu import ROWS, Tile

WORD = 32
"""Columns whose bits make a word."""
TURN = 128
"""Columns whose numbers are asked for at once: each is found by the bits before it, and then waited for."""
SECTION = 256
"""Columns of a row whose numbers lie together; where they begin is stored."""
MIDDLE = 128
"""The code of zero, of bytes."""
TILES = (
    Tile(bm=16, bn=128, warps=8, stages=2, split=4),
    Tile(bm=64, bn=128, warps=8, stages=2),
)
"""For few rows and more; chosen by counts of registers, not by time. Beside sums of 128 rows the places of
numbers do not fit the registers."""


class BitmapSpec(KernelSpec, frozen=True):
    """x bfloat16, sums float32; numbers of W that are stored are bfloat16, or codes of 8 bits with scales.

    Zeros are anywhere. At one half of them bfloat16 takes 9.1 bits a weight and codes 5.1. Each weight takes
    13 to 20 instructions whether it is zero or not; at 15, a Hopper at most keeps up with a dense matrix that
    is read at 4.5 TB a second, no more than it reads. So this saves memory, not time.
    """

    op: ClassVar[str] = "bitmap_linear_gpu"
    version: ClassVar[int] = 1

    values: Literal["bfloat16", "int8"] = "bfloat16"
    group: int = Field(default=0, ge=0)
    """Columns that share a scale, of codes; 0 when the whole row does."""
    scale: Literal["float16", "bfloat16"] = "float16"
    epilogue: tuple[str, ...] = ()
    tiles: tuple[Tile, ...] = Field(default=TILES, min_length=1)
    """By rows, the fewest first."""

    @model_validator(mode="after")
    def _possible(self) -> BitmapSpec:
        unknown = [name for name in self.epilogue if name not in EPILOGUES]
        if unknown:
            raise ValueError(f"no epilogue is called {', '.join(unknown)}; there are {', '.join(EPILOGUES)}")
        if self.group and self.values == "bfloat16":
            raise ValueError("numbers of 16 bits have no groups; leave `group` out")
        if self.group not in (0, 64) and self.group % TURN:
            raise ValueError(f"groups of {self.group} columns; 64, a multiple of {TURN}, or 0 for a row")
        if any(tile.bm > 64 for tile in self.tiles):
            raise ValueError("more than 64 rows spill registers")
        if list(self.tiles) != sorted(self.tiles, key=lambda tile: tile.bm):
            raise ValueError("tiles stand by rows, the fewest first")
        return self

    @property
    def run(self) -> int:
        """Columns of a turn that share a scale."""
        return min(self.group or TURN, TURN)

    def groups(self, k: int) -> int:
        """Scales of a row of k columns."""
        return 0 if self.values == "bfloat16" else k // self.group if self.group else 1

    def bytes(self, n: int, k: int, stored: int) -> int:
        """Bytes of the packed matrix [n, k] of which `stored` numbers are not zero."""
        rows, columns = -(-n // ROWS) * ROWS, padded(k)
        places = rows * columns // 8 + rows * columns // SECTION * 4
        return places + stored * (2 if self.values == "bfloat16" else 1) + self.groups(k) * rows * 2


def padded(k: int) -> int:
    """Columns that a row of k takes: whole sections."""
    return -(-k // SECTION) * SECTION


def refuses(spec: BitmapSpec, m: int, n: int, k: int, stored: int) -> str | None:
    """Why x [m, k] and W [n, k] with `stored` numbers should not take the kernel; None when they should."""
    step = spec.group or WORD
    if k % step:
        return f"K = {k} is not a multiple of {step}"
    most = max(tile.split for tile in spec.tiles)
    if max(stored, -(-n // ROWS) * ROWS * padded(k) // WORD, m * k, most * m * n) >= 2**31:
        return f"x [{m}, {k}] and W [{n}, {k}] need offsets beyond 31 bits"
    dense = n * k * (2 if spec.values == "bfloat16" else 1) + spec.groups(k) * n * 2
    if (size := spec.bytes(n, k, stored)) >= dense:
        share = f"{stored / (n * k):.0%} of the weights are not zero"
        return f"{share}: {size} bytes, and {dense} without a bitmap"
    return None
