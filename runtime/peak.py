"""The largest resident memory of this process while something runs."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Self

_EVERY = 0.02


class Peak:
    """Samples resident memory in a thread: `with Peak() as peak: ...; peak.bytes`, and `peak.seconds`."""

    def __init__(self) -> None:
        self.bytes = 0
        self.seconds = 0.0
        self._end = threading.Event()

    def __enter__(self) -> Self:
        give_back()
        self._start = time.perf_counter()
        self.bytes = resident()
        self._thread = threading.Thread(target=self._sample, daemon=True, name="effc-peak")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bytes = max(self.bytes, resident())
        self.seconds = time.perf_counter() - self._start
        self._end.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._end.wait(_EVERY):
            self.bytes = max(self.bytes, resident())


def give_back() -> None:
    """Return freed memory to the system, so that a peak holds nothing of what ran before."""
    gc.collect()
    trim()


def trim() -> None:
    """The same for what no cycle holds; cheap enough to be done after every matrix."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc alone


def resident() -> int:
    """Bytes of main memory that this process holds now; its high-water mark where the system says no more."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
