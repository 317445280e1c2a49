"""BinaryPlanesSpec: y = epilogue(x W^T), W a sum of planes of signs times scales (compiler/planes.py)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from effc.kernels.epilogue import EPILOGUES
from effc.kernels.kernel import KernelSpec

BLOCK = 64
"""Output channels that lie together: four vectors of 16."""
STRIDE = 32
"""Columns whose signs of one channel make a word; a row is filled up to a multiple of it."""


class BinaryPlanesSpec(KernelSpec, frozen=True):
    """x [M, K] and y [M, N] float32, W [N, K] of `planes` bits a weight and its scales.

    side = columns: each column has scales of its own, shared by `share` rows (0: by all), so scales go into
    x. side = rows: each row has its own, shared by `share` columns (0: by all), so they go into sums.
    """

    op: ClassVar[str] = "binary_planes"
    version: ClassVar[int] = 2

    planes: int = Field(ge=1, le=4)
    side: Literal["columns", "rows"] = "columns"
    share: int = Field(default=0, ge=0)
    """Rows (side = columns) or columns (side = rows) that share a scale; 0: all."""
    scale: Literal["pow2", "float16"] = "pow2"
    """Scales are sums of powers of two, stored as exponents, or half precision."""
    terms: int = Field(default=1, ge=1, le=3)
    """Powers of two in a scale."""
    epilogue: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _possible(self) -> BinaryPlanesSpec:
        unknown = [name for name in self.epilogue if name not in EPILOGUES]
        if unknown:
            raise ValueError(f"no epilogue is called {', '.join(unknown)}; there are {', '.join(EPILOGUES)}")
        if self.scale == "float16" and self.terms != 1:
            raise ValueError(f"a half precision scale is one number, not {self.terms} terms")
        unit = BLOCK if self.side == "columns" else STRIDE
        if self.share % unit:
            raise ValueError(
                f"{self.share} {_shared(self)} share a scale; a multiple of {unit}, or 0 for all"
            )
        return self

    def grid(self, n: int, k: int) -> tuple[int, int]:
        """A, B: runs of rows and of columns with scales of their own."""
        if self.side == "columns":
            return (n // self.share if self.share else 1), k
        return n, (k // self.share if self.share else 1)

    def bytes(self, n: int, k: int) -> int:
        """Bytes of signs and scales of W [n, k], which is what batch-1 decoding must read."""
        rows, columns = -(-n // BLOCK) * BLOCK, -(-k // STRIDE) * STRIDE
        a, b = self.grid(n, columns) if self.side == "columns" else self.grid(rows, k)
        size = 2 if self.scale == "float16" else self.terms
        return self.planes * (rows * columns // 8 + size * a * b)


def refuses(spec: BinaryPlanesSpec, n: int, k: int) -> str | None:
    """Why a matrix [n, k] cannot take the kernel; None when it can."""
    whole = n if spec.side == "columns" else k
    if spec.share and whole % spec.share:
        return f"{spec.share} {_shared(spec)} that share a scale do not divide {whole}"
    return None


def _shared(spec: BinaryPlanesSpec) -> str:
    return "rows" if spec.side == "columns" else "columns"
