"""Read and write tensors piece by piece: pread into reused buffers, float32 in the middle, no mmap, no torch.

A piece is a run of N numbers. bfloat16 is the upper half of a float32: reading shifts it up, writing rounds
to nearest, ties to even. A `Desk` holds the buffers of one thread; fresh arrays for every piece would cost
more in page faults than the arithmetic on them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from effc.specs.diagnostic import Diagnostic, EffcError

Array = NDArray[Any]

PIECE = 1 << 16
"""Numbers worked on at once: a handful of float32 arrays of 256 kB stay near the core."""
TOGETHER = 2
"""Pieces that a kernel takes at once: three inputs and a result of 256 kB in bfloat16 stay near the core, and
what a call costs is little beside the work in it."""
STRIP = 1 << 13
"""Numbers whose squares are added at once, few enough that no library starts threads for them."""

STORED: dict[str, type[np.generic]] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
}
"""safetensors dtype -> what its bytes are read as."""


class Desk:
    """The buffers of one thread: arrays handed out one after another, and room for stored bytes."""

    def __init__(self) -> None:
        self._arrays: dict[np.dtype[Any], list[Array]] = {}
        self._used: dict[np.dtype[Any], int] = {}
        self._length = PIECE
        self._raw = np.empty(PIECE, np.float64)

    def clear(self, length: int) -> None:
        """Take all arrays back; the next ones have this length."""
        self._used.clear()
        self._length = length

    def spare(self, dtype: DTypeLike = np.float32) -> Array:
        """One more array [length] of unknown content."""
        kind = np.dtype(dtype)
        arrays = self._arrays.setdefault(kind, [])
        used = self._used.get(kind, 0)
        if used == len(arrays):
            arrays.append(np.empty(PIECE, kind))
        self._used[kind] = used + 1
        return arrays[used][: self._length]

    def raw(self, dtype: str) -> Array:
        """Room for `length` stored numbers; one at a time."""
        return self._raw.view(STORED[dtype])[: self._length]


class Run(Protocol):
    """A tensor that can be read from any number on."""

    @property
    def size(self) -> int: ...

    def read(self, start: int, into: Array, desk: Desk) -> None:
        """Numbers start .. start + len(into), as float32."""


@dataclass(frozen=True, slots=True)
class OnDisk:
    """A tensor in an open file, `size` numbers from byte `offset`."""

    descriptor: int
    offset: int
    size: int
    dtype: str

    def read(self, start: int, into: Array, desk: Desk) -> None:
        raw = into if self.dtype == "F32" else desk.raw(self.dtype)
        fill(self.descriptor, raw, self.offset + start * raw.itemsize)
        if self.dtype == "BF16":
            bits = into.view(np.uint32)
            np.copyto(bits, raw)
            bits <<= 16
        elif self.dtype != "F32":
            np.copyto(into, raw, casting="same_kind")


@dataclass(frozen=True, slots=True)
class InMemory:
    """A tensor that had to be built whole, e.g. because the checkpoint stores it transposed."""

    numbers: Array

    @property
    def size(self) -> int:
        return self.numbers.size

    def read(self, start: int, into: Array, desk: Desk) -> None:
        np.copyto(into, self.numbers[start : start + into.size], casting="same_kind")


def fill(descriptor: int, raw: Array, offset: int) -> None:
    """Read bytes from `offset` on until `raw` is full.

    Raises:
        EOFError: the file ends before.
    """
    view = raw.data.cast("B")
    while view:
        got = os.preadv(descriptor, [view], offset)
        if got == 0:
            raise EOFError(f"a file ends {len(view)} bytes early")
        view, offset = view[got:], offset + got


def write(descriptor: int, offset: int, numbers: Array, dtype: str, desk: Desk) -> None:
    """Round float32 numbers to nearest even and write them at byte `offset`. Uses the numbers up."""
    raw = numbers
    if dtype == "BF16":
        bits = numbers.view(np.uint32)
        odd = desk.spare(np.uint32)
        np.right_shift(bits, 16, out=odd)
        odd &= 1
        odd += 0x7FFF
        odd += bits
        odd >>= 16
        raw = desk.raw(dtype)
        np.copyto(raw, odd, casting="unsafe")
    elif dtype != "F32":
        raw = desk.raw(dtype)
        np.copyto(raw, numbers, casting="unsafe")
    put(descriptor, raw, offset)


def put(descriptor: int, raw: Array, offset: int) -> None:
    """Write all bytes of `raw` from `offset` on."""
    view = raw.data.cast("B")
    while view:
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done


def finite(numbers: Array) -> bool:
    """Whether no number is infinite or NaN. The sum of squares is finite unless one is, or it overflows."""
    even = numbers.size - numbers.size % STRIP
    rows, rest = numbers[:even].reshape(-1, STRIP), numbers[even:]
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(np.vecdot(rows, rows).sum() + np.dot(rest, rest)):
            return True
    return bool(np.isfinite(numbers).all())


def not_finite(name: str, which: str) -> None:
    """Refuse a tensor of a model.

    Raises:
        EffcError: E456.
    """
    raise EffcError(
        Diagnostic(
            "E456",
            f"`{name}` holds a number that is not finite",
            notes=(f"found in {which}",),
            help="that checkpoint is damaged or its training diverged; leave it out",
        )
    )


def spans(size: int) -> list[tuple[int, int]]:
    """The pieces of a tensor of `size` numbers: (start, stop)."""
    return [(start, min(start + PIECE, size)) for start in range(0, size, PIECE)]


def stretches(size: int) -> list[tuple[int, int]]:
    """The same for what kernels take at once: a few pieces each."""
    step = PIECE * TOGETHER
    return [(start, min(start + step, size)) for start in range(0, size, step)]
