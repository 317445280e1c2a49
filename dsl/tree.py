"""The syntax tree: what was written, before any meaning. Both surfaces make it, the formatter prints it.

Two trees are equal when they say the same, wherever and however spaced it was written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from effc.specs.source import Source, Span


@dataclass(frozen=True, slots=True)
class Word:
    """One dotted path of words: the name of a binding, a method, an argument."""

    text: str
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Name:
    """A path of words where a value stands: a binding, a constant, or a word of an enumeration."""

    text: str
    span: Span = field(compare=False, repr=False)
    sigil: bool | None = field(default=None, compare=False, repr=False)
    """In YAML, whether it was written `$name`; None in text."""


@dataclass(frozen=True, slots=True)
class Number:
    """A number as written, sign included, and its unit in canonical spacing ("M tokens")."""

    text: str
    unit: str | None
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Text:
    """A string, escapes resolved."""

    value: str
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Pattern:
    """N of M, written 2:4."""

    text: str
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Constant:
    """true, false or none."""

    value: bool | None
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class List:
    items: tuple[Value, ...]
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Table:
    """{on = "head", skip = true}"""

    entries: tuple[Entry, ...]
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Call:
    """quantize.gptq(heal, bits = 4): values without a name first."""

    name: Word
    values: tuple[Value, ...]
    named: tuple[Entry, ...]
    span: Span = field(compare=False, repr=False)


Value = Name | Number | Text | Pattern | Constant | List | Table | Call


@dataclass(frozen=True, slots=True)
class Entry:
    """key = value"""

    key: Word
    value: Value

    @property
    def span(self) -> Span:
        return self.key.span.to(self.value.span)


@dataclass(frozen=True, slots=True)
class Version:
    number: Number
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Title:
    name: Word
    title: Text | None
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Let:
    """`param steps = 400` or `let seq = 256`."""

    keyword: Literal["param", "let"]
    name: Word
    value: Value
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Bind:
    """`model base = load(...)`, `data code = ...`, `thin = prune.depth(...)`."""

    keyword: Literal["model", "data", "stage"]
    name: Word
    value: Value
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Use:
    path: Text
    alias: Word
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a comparison: a measure, moved by an amount when `amount` is there."""

    base: Name | Call | Number
    sign: Literal["+", "-"] | None
    amount: Number | None
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Expect:
    left: Side
    op: str
    right: Side
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Export:
    model: Word
    calls: tuple[Call, ...]
    span: Span = field(compare=False, repr=False)


Statement = Version | Title | Let | Bind | Use | Expect | Export


@dataclass(frozen=True, slots=True)
class Comment:
    """`# ...` to the end of its line."""

    text: str
    span: Span
    alone: bool
    """Whether nothing else stands on its line."""


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed file. `broken` holds names that statements with syntax errors would have bound."""

    statements: tuple[Statement, ...]
    source: Source = field(compare=False, repr=False)
    comments: tuple[Comment, ...] = field(default=(), compare=False, repr=False)
    broken: frozenset[str] = field(default=frozenset(), compare=False, repr=False)
    yaml: bool = field(default=False, compare=False)


def names_in(value: Value) -> Iterator[Name]:
    """Every Name inside a value, in order."""
    match value:
        case Name():
            yield value
        case List():
            for item in value.items:
                yield from names_in(item)
        case Table():
            for entry in value.entries:
                yield from names_in(entry.value)
        case Call():
            for item in value.values:
                yield from names_in(item)
            for entry in value.named:
                yield from names_in(entry.value)
