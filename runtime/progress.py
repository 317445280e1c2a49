"""What happens in a run, as events; and three ways to show them: a live bar, plain lines, JSON lines.

A run tells its observers and prints nothing itself. All of this goes to stderr; stdout is for the result.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal, TextIO

from effc.specs.units import fmt_seconds

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

What = Literal[
    "start", "cached", "waiting", "resumed", "progress", "done", "expect", "cancelled", "export", "note"
]


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to a binding, an expect or an export."""

    what: What
    name: str
    text: str = ""
    done: int = 0
    of: int = 0
    unit: str = ""
    seconds: float = 0.0


Observer = Callable[[Event], None]


def observer(json_lines: bool = False, quiet: bool = False, stream: TextIO | None = None) -> Observer:
    """The way to show events that fits where they go."""
    out = stream or sys.stderr
    if quiet:
        return lambda event: None
    if json_lines:
        return JsonLines(out)
    return Live(out) if out.isatty() else Lines(out)


class JsonLines:
    """One JSON object a line."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def __call__(self, event: Event) -> None:
        held = {k: v for k, v in asdict(event).items() if v not in ("", 0, 0.0)}
        print(json.dumps({"event": held.pop("what"), **held}), file=self._out, flush=True)


class Lines:
    """Plain lines for a pipe or a log file; progress at most every `every` seconds."""

    def __init__(self, out: TextIO, every: float = 10.0) -> None:
        self._out, self._every = out, every
        self._pace = Pace()
        self._said = 0.0

    def __call__(self, event: Event) -> None:
        if event.what == "progress":
            self._pace.see(event)
            if time.monotonic() - self._said < self._every:
                return
            text = f"{event.name}: {event.done} of {event.of} {event.unit}{self._pace.words()}"
        else:
            self._pace.begin()
            text = sentence(event)
        self._said = time.monotonic()
        print(text, file=self._out, flush=True)


class Live:
    """A bar with rate and time left for the stage that runs; a line for each that is done."""

    def __init__(self, out: TextIO) -> None:
        from rich.console import Console

        self._console = Console(file=out, highlight=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._pace = Pace()

    def __call__(self, event: Event) -> None:
        if event.what == "progress":
            self._pace.see(event)
            self._draw(event)
            return
        self._close()
        self._pace.begin()
        if event.what != "start":
            self._console.print(sentence(event), markup=False, soft_wrap=True)

    def _draw(self, event: Event) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        if self._bar is None:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[pace]}"),
            )
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(event.name, total=event.of, pace="")
        assert self._task is not None
        pace = f"{event.done} of {event.of} {event.unit}{self._pace.words()}"
        self._bar.update(self._task, completed=event.done, total=event.of, pace=pace)
        if event.done >= event.of:
            self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None


class Pace:
    """Rate and time left, from the units seen since the stage began or went on."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self._first: tuple[float, int] | None = None
        self._last: Event | None = None

    def see(self, event: Event) -> None:
        self._last = event
        if self._first is None or event.done < self._first[1]:
            self._first = (time.monotonic(), event.done)

    def words(self) -> str:
        """ ", 3.1 a second, 12 s left"; empty until there is a rate."""
        if self._first is None or self._last is None or self._last.done <= self._first[1]:
            return ""
        rate = (self._last.done - self._first[1]) / max(1e-9, time.monotonic() - self._first[0])
        speed = f"{rate:.3g} a second" if rate >= 1 else f"{fmt_seconds(1 / rate)} each"
        return f", {speed}, {fmt_seconds((self._last.of - self._last.done) / rate)} left"


def sentence(event: Event) -> str:
    """An event as one line."""
    match event.what:
        case "start":
            return f"{event.name}: {event.text}"
        case "cached":
            return f"{event.name}: taken from the store"
        case "resumed":
            return f"{event.name}: goes on behind {event.text}"
        case "waiting":
            return f"{event.name}: waits for {event.text}, which works on the same stage"
        case "done":
            return (
                f"{event.name}: done in {fmt_seconds(event.seconds)}{', ' + event.text if event.text else ''}"
            )
        case "cancelled":
            return f"{event.name}: not run, {event.text}"
        case "export":
            return f"{event.name}: written to {event.text}"
    return f"{event.name}: {event.text}" if event.name else event.text
