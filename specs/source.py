"""Source text and spans: where in a recipe something was written."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True, eq=False)
class Source:
    """A named piece of text. Two sources are the same only if they are one object."""

    name: str
    text: str = field(repr=False)
    folder: Path | None = field(default=None, repr=False)
    """The folder of the file it came from; `use` looks there. None for text that is in no file."""

    @cached_property
    def lines(self) -> list[int]:
        """Offset of the first character of every line."""
        starts, at = [0], self.text.find("\n")
        while at >= 0:
            starts.append(at + 1)
            at = self.text.find("\n", at + 1)
        return starts

    def locate(self, offset: int) -> tuple[int, int]:
        """The 1-based (line, column) of a character offset; offsets past the end name the end."""
        offset = min(max(offset, 0), len(self.text))
        line = bisect_right(self.lines, offset)
        return line, offset - self.lines[line - 1] + 1

    def line(self, number: int) -> tuple[int, int]:
        """The [start, end) offsets of a 1-based line, its line break left out."""
        start = self.lines[number - 1]
        end = self.lines[number] - 1 if number < len(self.lines) else len(self.text)
        if end > start and self.text[end - 1] == "\r":
            end -= 1
        return start, end

    def span(self, start: int, end: int) -> Span:
        return Span(self, start, end)


@dataclass(frozen=True, slots=True)
class Span:
    """A half-open range [start, end) of character offsets in one source."""

    source: Source
    start: int
    end: int

    @property
    def text(self) -> str:
        return self.source.text[self.start : self.end]

    def to(self, other: Span) -> Span:
        """From the start of this span to the end of another in the same source."""
        return Span(self.source, self.start, max(self.end, other.end))

    def __str__(self) -> str:
        line, column = self.source.locate(self.start)
        return f"{self.source.name}:{line}:{column}"
