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
_earlier = 0
"""High-water mark of the process when it was last set back, bytes."""


class Peak:
    """`with Peak() as peak: ...`, then `peak.bytes`, `peak.seconds` and `peak.work`.

    The system's own high-water mark is set back at the start, so that nothing short is missed; where it
    cannot be, a thread samples what is resident.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.seconds = 0.0
        self.work = 0.0
        """Seconds of processor time of all threads; less than `seconds` where others used the machine."""
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        give_back()
        self._start, self._begun = time.perf_counter(), time.process_time()
        self.bytes = resident()
        if not _set_back():
            self._thread = threading.Thread(target=self._sample, daemon=True, name="effc-peak")
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds, self.work = time.perf_counter() - self._start, time.process_time() - self._begun
        if self._thread is None:
            self.bytes = max(self.bytes, _mark())
        else:
            self.bytes = max(self.bytes, resident())
            self._end.set()
            self._thread.join()

    def _sample(self) -> None:
        while not self._end.wait(_EVERY):
            self.bytes = max(self.bytes, resident())


def high_water() -> int:
    """The most bytes that were ever resident in this process, over all that `Peak` has set back."""
    return max(_earlier, _mark())


def _mark() -> int:
    """The high-water mark since it was last set back."""
    with suppress(OSError, IndexError, ValueError), open("/proc/self/status", "rb") as file:
        return int(file.read().partition(b"VmHWM:")[2].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _set_back() -> bool:
    """Set the high-water mark to what is resident now; False where the system does not let us."""
    global _earlier
    before = high_water()
    try:
        with open("/proc/self/clear_refs", "wb") as file:
            file.write(b"5")
    except OSError:
        return False
    _earlier = before
    return True


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
        return _mark()
