"""MultiLoraSpec (C) and MultiLoraGpuSpec (Triton): adapters for rows that each have their own."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from effc.kernels.cpu.stored import Stored
from effc.kernels.kernel import KernelSpec


class MultiLoraSpec(KernelSpec, frozen=True):
    """y[m] += s_i B_i (A_i x[m]), i the adapter of row m; x and y float32, factors as stored."""

    op: ClassVar[str] = "multi_lora"
    version: ClassVar[int] = 1

    factor: Stored = "float32"


class MultiLoraGpuSpec(KernelSpec, frozen=True):
    """y[m] = base[m] + s_i B_i (A_i x[m]), i the adapter of row m; all bfloat16, sums float32.

    The way between, A_i x, is float32; the second product takes it as two bfloat16 numbers, so that what it
    loses is below 2^-16 of it.
    """

    op: ClassVar[str] = "multi_lora_gpu"
    version: ClassVar[int] = 1

    rank: Literal[16, 32, 64, 128] = 64
    """The largest rank an adapter may have; each program works at its own adapter's."""
    block: Literal[16, 32, 64] = 16
    """Ranks that one step takes."""
    rows: Literal[16, 32, 64] = 16
    """Rows of one adapter that go together."""
    columns: Literal[64, 128, 256] = 128
    """Columns of x in a turn of the first product, a field of the order of its sums."""
    channels: Literal[64, 128] = 128
    """Channels of a program of the second."""
    split: int = Field(default=8, ge=1, le=64)
    """Programs that share the columns of the first; their sums are added in order by the second."""

    @model_validator(mode="after")
    def _possible(self) -> MultiLoraGpuSpec:
        if self.block > self.rank:
            raise ValueError(f"steps of {self.block} ranks of {self.rank}")
        return self


def refuses(spec: MultiLoraGpuSpec, m: int, n: int, k: int, ranks: int, most: int) -> str | None:
    """Why x [m, k] and adapters with `ranks` ranks in all, `most` at one, cannot take the kernel."""
    if most > spec.rank:
        return f"an adapter has rank {most}, the kernel at most {spec.rank}"
    if k % spec.columns:
        return f"K = {k} is not a multiple of {spec.columns}"
    if max(ranks * max(n, k), m * max(n, k), spec.split * m * spec.rank) >= 2**31:
        return f"x [{m}, {k}] and {ranks} ranks need offsets beyond 31 bits"
    return None
