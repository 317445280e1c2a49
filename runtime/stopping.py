"""Stop on a signal: at the next unit boundary, or within two seconds where the boundary is further away.

Whatever is published is published by one rename, so ending between two instructions is safe; a boundary only
saves repeating the unit. A second signal ends at once.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

PATIENCE = 1.2
"""Seconds a unit gets to finish."""


class Stopping:
    """`with Stopping() as stop: ...` makes `stop()` true after SIGINT or SIGTERM; handlers are put back.

    Outside the main thread there are no signals to handle, and `stop()` stays false.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self._asked

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
            self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._late)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)

    def _late(self, number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt
