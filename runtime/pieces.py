"""Read and write tensors piece by piece: pread into reused buffers, float32 in the middle, no mmap, no torch.

A piece is a run of N numbers. bfloat16 is the upper half of a float32: reading shifts it up, writing rounds
to nearest, ties to even. Buffers belong to a thread, so pieces of one tensor can be worked on side by side.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

PIECE = 1 << 18
"""Numbers worked on at once: a few float32 arrays of 1 MB stay in a core's own cache."""

STORED: dict[str, type[np.generic]] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
}
"""safetensors dtype -> what its bytes are read as."""


class Run(Protocol):
    """A tensor that can be read from any number to any other."""

    size: int

    def read(self, start: int, stop: int) -> Array: ...


@dataclass(frozen=True, slots=True)
class OnDisk:
    """A tensor in an open file, `size` numbers from byte `offset`."""

    descriptor: int
    offset: int
    size: int
    dtype: str

    def read(self, start: int, stop: int) -> Array:
        """Numbers start..stop as a fresh float32 array [stop - start]."""
        raw = np.empty(stop - start, STORED[self.dtype])
        _fill(self.descriptor, raw, self.offset + start * raw.itemsize)
        return widen(raw, self.dtype)


@dataclass(frozen=True, slots=True)
class InMemory:
    """A tensor that had to be built whole, e.g. because the checkpoint stores it transposed."""

    numbers: Array

    @property
    def size(self) -> int:
        return self.numbers.size

    def read(self, start: int, stop: int) -> Array:
        return self.numbers[start:stop].copy()


def _fill(descriptor: int, raw: Array, offset: int) -> None:
    view = memoryview(raw).cast("B")
    while view:
        got = os.preadv(descriptor, [view], offset)
        if got == 0:
            raise EOFError(f"the file ends {len(view)} bytes early")
        view, offset = view[got:], offset + got


def widen(raw: Array, dtype: str) -> Array:
    """Stored numbers -> float32."""
    if dtype == "BF16":
        bits = raw.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    return raw if dtype == "F32" else raw.astype(np.float32)


def narrow(numbers: Array, dtype: str) -> Array:
    """float32 -> stored numbers, rounded to nearest, ties to even. The input is used up."""
    if dtype == "BF16":
        bits = numbers.view(np.uint32)
        odd = bits >> 16
        odd &= 1
        odd += 0x7FFF
        odd += bits
        odd >>= 16
        return odd.astype(np.uint16)
    return numbers if dtype == "F32" else numbers.astype(STORED[dtype])


def put(descriptor: int, raw: Array, offset: int) -> None:
    """Write all bytes of `raw` at `offset`."""
    view = memoryview(np.ascontiguousarray(raw)).cast("B")
    while view:
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done


def finite(numbers: Array) -> bool:
    """Whether no number is infinite or NaN. The sum of squares is finite unless one is, or it overflows."""
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(np.dot(numbers, numbers)):
            return True
    return bool(np.isfinite(numbers).all())


def spans(size: int) -> list[tuple[int, int]]:
    """The pieces of a tensor: (start, stop)."""
    return [(start, min(start + PIECE, size)) for start in range(0, size, PIECE)]


def add_up(parts: Sequence[Array]) -> Array:
    """The sum of equal arrays in their order, so that threads do not change it."""
    total: Array = parts[0].copy()
    for part in parts[1:]:
        total += part
    return total
