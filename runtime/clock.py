"""How long a run takes beside its stages: opening data, measuring for the report, judging, exporting."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from effc.compiler.around import Around


class Clock:
    """Seconds by what they were spent on; what is timed inside something else counts for itself alone."""

    def __init__(self) -> None:
        self._spent: dict[tuple[str, str], float] = {}
        self._within: list[float] = []

    @contextmanager
    def on(self, name: str, what: str) -> Iterator[None]:
        """Count a block."""
        start = time.perf_counter()
        self._within.append(0.0)
        try:
            yield
        finally:
            whole = time.perf_counter() - start
            inner = self._within.pop()
            if self._within:
                self._within[-1] += whole
            self._spent[name, what] = self._spent.get((name, what), 0.0) + whole - inner

    def rows(self) -> tuple[Around, ...]:
        """Every line, in the order of plans."""
        order = ("data", "report", "expect", "export")
        found = sorted(self._spent.items(), key=lambda item: order.index(item[0][0]))
        return tuple(Around(*about, seconds) for about, seconds in found)
