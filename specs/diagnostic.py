"""Diagnostics are data; rendering them is one function; raising them is one exception."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from effc.specs.source import Span

WIDTH = 120
"""Columns of an excerpt; longer lines are clipped around the caret."""
TAB = "    "
LONGEST = 400
"""Characters of a sentence; what is longer quotes something absurd."""


@dataclass(frozen=True, slots=True)
class Label:
    """A span of source with a few words beneath it."""

    span: Span
    text: str = ""


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One problem, told once: what is wrong, where, and what to write instead."""

    code: str
    title: str
    labels: Sequence[Label] = ()
    notes: Sequence[str] = ()
    help: str | None = None
    severity: Literal["error", "warning"] = "error"
    about: str = ""
    """The argument that is to blame, for those who know models but no text: "group", "rules[1].on"."""

    def render(self) -> str:
        """Header, excerpts with carets, notes, help. Safe to print whatever the source holds."""
        out = [f"{self.severity}[{self.code}]: {_plain(self.title)}"]
        gutter = max((len(str(_line(label))) for label in self.labels), default=1)
        for label in self.labels:
            out += _excerpt(label, gutter)
        pad = " " * gutter
        notes = [("note", note) for note in self.notes] + ([("help", self.help)] if self.help else [])
        for kind, note in notes:
            first, *rest = note.splitlines() or [""]
            out.append(f"{pad} = {kind}: {_plain(first)}".rstrip())
            out += [f"{pad}         {_plain(line)}".rstrip() for line in rest]
        return "\n".join(out)

    def as_json(self) -> dict[str, Any]:
        """The same as data: lines, columns and offsets are of the source text, columns count from 1."""
        return {
            "code": self.code,
            "severity": self.severity,
            "title": self.title,
            "labels": [_label_json(label) for label in self.labels],
            "notes": list(self.notes),
            "help": self.help,
        }

    def sort_key(self) -> tuple[str, int, str]:
        """By place, then code; what has no place comes last."""
        if not self.labels:
            return ("\U0010ffff", 0, self.code)
        span = self.labels[0].span
        return (span.source.name, span.start, self.code)


class EffcError(Exception):
    """The one exception that crosses a floor; carries every diagnostic found."""

    def __init__(self, *diagnostics: Diagnostic) -> None:
        self.diagnostics = diagnostics
        super().__init__(*diagnostics)

    def __str__(self) -> str:
        return "\n\n".join(d.render() for d in self.diagnostics)


def _line(label: Label) -> int:
    return label.span.source.locate(label.span.start)[0]


def _excerpt(label: Label, gutter: int) -> list[str]:
    """The place, the line, and carets under the part of the span that lies in that line."""
    span = label.span
    number, _ = span.source.locate(span.start)
    first, last = span.source.line(number)
    start, end = min(span.start, last), max(min(span.end, last), min(span.start, last))
    left, right = _window(first, last, start, end)
    text = span.source.text
    before, under, after = (_plain(text[a:b]) for a, b in ((left, start), (start, end), (end, right)))
    head, tail = ("..." if left > first else ""), ("..." if right < last else "")
    carets = " " * (_columns(before) + len(head)) + "^" * max(1, _columns(under))
    pad = " " * gutter
    return [
        f"{pad}--> {span}",
        f"{pad} |",
        f"{number:>{gutter}} | {head}{before}{under}{after}{tail}".rstrip(),
        f"{pad} | {carets} {_plain(label.text)}".rstrip(),
        f"{pad} |",
    ]


def _window(first: int, last: int, start: int, end: int) -> tuple[int, int]:
    """The part [left, right) of the line [first, last) that is shown around [start, end)."""
    if last - first <= WIDTH:
        return first, last
    left = max(first, start - WIDTH // 3)
    return left, min(last, left + WIDTH)


def _plain(text: str) -> str:
    """Text without control, direction or surrogate characters, so that a source cannot drive a terminal."""
    if len(text) > LONGEST:
        text = text[:LONGEST] + "..."
    text = text.replace("\t", TAB)
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _columns(text: str) -> int:
    """Columns that a terminal gives the text: wide characters take two, combining ones none."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) != 0 for c in text)


def _label_json(label: Label) -> dict[str, Any]:
    span = label.span
    line, column = span.source.locate(span.start)
    end_line, end_column = span.source.locate(span.end)
    return {
        "file": span.source.name,
        "line": line,
        "column": column,
        "end_line": end_line,
        "end_column": end_column,
        "text": label.text,
    }
