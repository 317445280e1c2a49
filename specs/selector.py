"""Selectors: which modules of a model are meant, in canonical names. Grammar and matching, nothing else.

layers[4..11].mlp.*    layers 4 to 11 (both included), everything below mlp
layers[-4..]           the last four layers, whole
layers[::4]            every fourth layer, from the first
layers[0,2,-1].mlp.up  three layers
head, attention.q      a role: every module that plays it, or one below it
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import NamedTuple, Self

LONGEST = 200
"""Characters of a selector; bounds what matching can cost."""

_SEGMENT = re.compile(r"(?P<name>[A-Za-z0-9_*?-]+)(?:\[(?P<index>[^\]\[]*)\])?\Z")
_INDEX = re.compile(r"-?\d{1,6}\Z")
_RANGE = re.compile(r"(?P<first>-?\d{1,6})?\.\.(?P<last>-?\d{1,6})?(?::(?P<step>\d{1,6}))?\Z")
_EVERY = re.compile(r"::(?P<step>\d{1,6})\Z")


class Name(NamedTuple):
    """One module: its canonical path, the role it plays, the layer it lies in."""

    path: str
    role: str
    layer: int | None = None


class SelectorError(ValueError):
    """A selector that does not parse; the message says what to write."""


@dataclass(frozen=True, slots=True)
class Selector:
    """A parsed selector: `segments` of the path, and the index on the first segment if there is one."""

    text: str
    segments: tuple[str, ...]
    index: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises SelectorError with a sentence about what is wrong."""
        if not text or len(text) > LONGEST:
            raise SelectorError(
                "is empty" if not text else f"has {len(text)} characters, at most {LONGEST} fit"
            )
        head, bracket, rest = text.partition("]")
        pieces = [head + bracket, *rest.lstrip(".").split(".")] if bracket and rest else [text]
        if not bracket:
            pieces = text.split(".")
        if bracket and rest and not rest.startswith("."):
            raise SelectorError(f"lacks a `.` after `{head + bracket}`")
        segments: list[str] = []
        index: str | None = None
        for place, piece in enumerate(pieces):
            found = _SEGMENT.match(piece)
            if not found:
                raise SelectorError(
                    f"cannot hold `{piece}`: parts are words joined by `.`, as in layers[0].mlp.up"
                )
            if found["index"] is not None:
                if place or found["name"] != "layers":
                    raise SelectorError(f"has an index on `{found['name']}`; only `layers` is counted")
                index = str(found["index"]).replace(" ", "")
                _check_index(index)
            segments.append(found["name"])
        return cls(text, tuple(segments), index)

    def match(self, names: Sequence[Name]) -> list[str]:
        """Paths that the selector means, in the order of `names`."""
        if self.segments[0] != "layers":
            return [n.path for n in names if self._within(n.role) or self._within(n.path)]
        layers = self.layers(1 + max((n.layer for n in names if n.layer is not None), default=-1))
        return [n.path for n in names if n.layer in layers and self._within(n.path, skip=2)]

    def layers(self, count: int) -> frozenset[int]:
        """The layers meant in a model of `count` layers; those it does not have are left out."""
        every = range(count)
        if self.index is None or self.index in ("*", ""):
            return frozenset(every)
        if found := _EVERY.match(self.index):
            return frozenset(every[:: int(found["step"])])
        if found := _RANGE.match(self.index):
            first = _place(found["first"], count, 0)
            last = _place(found["last"], count, count - 1)
            return frozenset(range(first, last + 1, int(found["step"] or 1))) & frozenset(every)
        return frozenset(_place(i, count, 0) for i in self.index.split(",")) & frozenset(every)

    def near(self, names: Sequence[Name], at_most: int = 3) -> list[str]:
        """Selectors that would match something and look like this one."""
        roles = sorted({n.role for n in names})
        if self.segments[0] != "layers":
            return get_close_matches(".".join(self.segments), roles, n=at_most, cutoff=0.5)
        count = 1 + max((n.layer for n in names if n.layer is not None), default=-1)
        if not count:
            return []
        head = (
            f"layers[{self.index}]"
            if self.index is not None and self.layers(count)
            else f"layers[..{count - 1}]"
        )
        if len(self.segments) == 1:
            return [head]
        below = sorted(
            {n.path.split(".", 2)[2] for n in names if n.layer is not None and n.path.count(".") > 1}
        )
        below = sorted({*below, *(path.rpartition(".")[0] for path in below if "." in path)})
        rest = ".".join(self.segments[1:])
        if any(self._below(path) for path in below):
            return [f"{head}.{rest}"]
        return [f"{head}.{path}" for path in get_close_matches(rest, below, n=at_most, cutoff=0.4)]

    def _within(self, dotted: str, skip: int = 0) -> bool:
        """Whether the selector's segments match the first segments of a path or role."""
        parts = dotted.split(".")[skip:]
        wanted = self.segments[1:] if skip else self.segments
        if wanted and wanted[-1] == "*" and len(parts) < len(wanted):
            return False
        return len(parts) >= len(wanted) and all(map(fnmatchcase, parts, wanted))

    def _below(self, dotted: str) -> bool:
        parts, wanted = dotted.split("."), self.segments[1:]
        return len(parts) >= len(wanted) and all(map(fnmatchcase, parts, wanted))

    def __str__(self) -> str:
        return self.text


def _check_index(index: str) -> None:
    """Refuse an index that would mean nothing."""
    if index in ("*", ""):
        return
    if found := (_EVERY.match(index) or _RANGE.match(index)):
        if found["step"] == "0":
            raise SelectorError(f"steps by 0 in `[{index}]`; the step is at least 1")
        return
    if not all(_INDEX.match(part) for part in index.split(",")):
        raise SelectorError(f"cannot count with `[{index}]`; write [3], [0,2,-1], [4..11], [-4..] or [::4]")


def _place(text: str | None, count: int, default: int) -> int:
    """A layer number; negative counts from the end, and what lies before the first stays below 0."""
    if text is None:
        return default
    number = int(text)
    return number + count if number < 0 else number
