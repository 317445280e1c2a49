"""SparseLowRankSpec: y = x (s B A + S)^T on a GPU, and slopes of all that trains, without a dense W or dW."""

from __future__ import annotations

from typing import ClassVar, Literal

from effc.kernels.kernel import KernelSpec

BLOCK = 64
"""Columns of S whose numbers lie together behind one count."""


class SparseLowRankSpec(KernelSpec, frozen=True):
    """x, y, A, B and the numbers of S bfloat16, sums float32; places of S never change.

    Tiles of S are made in registers from a bit for each place and its numbers in order, and multiplied by
    the matrix unit. x A^T and dy B are thin products, which torch does; what they give is rounded to
    bfloat16. Slopes of S are made a tile at a time, of which only the numbers at places of S are stored.
    """

    op: ClassVar[str] = "sparse_low_rank_gpu"
    version: ClassVar[int] = 1

    rank: Literal[16, 32, 64, 128, 256] = 128
    """To which A and B are filled up."""
    rows: Literal[16, 32, 64, 128] = 128
    """Rows of x of a program."""
    step: Literal[16, 32, 64] = 32
    """Rows in a turn of the sums over rows, a field of their order."""

    @property
    def warps(self) -> int:
        """Of the products: with 4, tiles of many rows do not fit the registers beside what is gathered."""
        return 8 if self.rows >= 64 else 4


def bytes(n: int, k: int, numbers: int) -> int:
    """Of S [n, k] as the kernels read it: bits, counts and numbers."""
    return n * k // 8 + 4 * n * (k // BLOCK) + 2 * numbers


def refuses(spec: SparseLowRankSpec, m: int, n: int, k: int, rank: int) -> str | None:
    """Why x [m, k] and W [n, k] of this rank cannot take the kernels; None when they can."""
    if rank > spec.rank:
        return f"rank {rank}, the kernel takes {spec.rank} at most"
    for name, size in (("K", k), ("N", n)):
        if size % BLOCK:
            return f"{name} = {size} is not a multiple of {BLOCK}"
    if max(m * max(n, k), n * k) >= 2**31:
        return f"x [{m}, {k}] and W [{n}, {k}] need offsets beyond 31 bits"
    return None
