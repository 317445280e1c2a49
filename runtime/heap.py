"""Heap: large blocks of memory go back to the system as soon as they are freed, while a model streams.

The C library raises the size from which it maps blocks of their own to that of the largest block freed so
far. From then on matrices come from its heap, where what small blocks lie behind cannot be given back, and
the memory of a stage grows with the layers it has seen.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from effc.runtime.peak import trim

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's names of the two settings in malloc.h."""
LARGE = 1 << 20
"""Bytes from which a block is mapped by itself inside `returning`."""
USUAL = 32 << 20
"""The same outside: the most that glibc raises it to by itself."""


@contextmanager
def returning() -> Iterator[None]:
    """Map large blocks one by one; systems without glibc go on as they are."""
    _set(LARGE)
    try:
        yield
    finally:
        _set(USUAL)
        trim()


def _set(size: int) -> None:
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, size)
        library.mallopt(_TRIM_THRESHOLD, 2 * size)  # as glibc sets it, beside the other
