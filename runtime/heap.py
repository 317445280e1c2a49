"""Heap: freed blocks of memory go back to the system at once while a model streams, and stay in a loop.

The C library raises the size from which it maps blocks of their own to that of the largest block freed so
far. From then on matrices come from its heap, where what small blocks lie behind cannot be given back, and
the memory of a stage grows with the layers it has seen.

A training, and a pass of many batches through one layer, frees and asks for the same blocks again and again.
Mapped anew, every page of them is cleared by the system at its first touch: a fifth of the time of a training
step of one second, a third of a GPTQ of 110M weights.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from effc.runtime.peak import trim

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""glibc's names of the settings in malloc.h."""
LARGE = 1 << 20
"""Bytes from which a block is mapped by itself inside `returning`."""
USUAL = 32 << 20
"""The same outside: the most that glibc raises it to by itself."""
NEVER = (1 << 31) - 1
"""Bytes free at the heap's end from which some go back inside `keeping`: the most that can be said."""
BLOCKS = 1 << 16
"""How many blocks may be mapped by themselves outside `keeping`, as glibc has it."""

_modes = [(USUAL, 2 * USUAL, BLOCKS)]
"""What holds now, last, and below it what holds again after it."""


@contextmanager
def returning() -> Iterator[None]:
    """Map large blocks one by one; systems without glibc go on as they are."""
    with _mode(LARGE, 2 * LARGE, BLOCKS):
        yield


@contextmanager
def keeping() -> Iterator[None]:
    """Take every block from the heap and give none back before the end, inside `returning` too."""
    with _mode(USUAL, NEVER, 0):
        yield


@contextmanager
def _mode(mapped_from: int, trimmed_from: int, most_mapped: int) -> Iterator[None]:
    settings = (mapped_from, trimmed_from, most_mapped)
    _modes.append(settings)
    _set(*settings)
    try:
        yield
    finally:
        _modes.remove(settings)
        _set(*_modes[-1])
        trim()


def _set(mapped_from: int, trimmed_from: int, most_mapped: int) -> None:
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, mapped_from)
        library.mallopt(_TRIM_THRESHOLD, trimmed_from)
        library.mallopt(_MMAP_MAX, most_mapped)
