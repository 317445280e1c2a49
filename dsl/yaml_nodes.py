"""YAML to nodes with a mark on each: duplicate keys refused, and anchors, aliases, tags and merge keys."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from effc.dsl.lexer import DEEPEST
from effc.specs.diagnostic import Diagnostic, EffcError, Label
from effc.specs.source import Source, Span

MOST_NODES = 100_000
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


@dataclass(slots=True)
class Scalar:
    value: str
    plain: bool
    span: Span


@dataclass(slots=True)
class Sequence_:
    items: list[Node]
    span: Span


@dataclass(slots=True)
class Mapping_:
    items: list[tuple[Scalar, Node]]
    span: Span
    table: bool = False


Node = Scalar | Sequence_ | Mapping_


def compose(source: Source) -> Node:
    """The document's nodes. Raises EffcError E105, E108, E110, E111, E112."""
    import yaml

    if found := _CONTROL.search(source.text):
        label = Label(Span(source, found.start(), found.end()))
        raise EffcError(
            Diagnostic("E105", f"the control character {ord(found[0]):#04x} has no meaning", [label])
        )
    loader: Any = getattr(yaml, "CLoader", yaml.Loader)  # events alone; nothing is constructed
    builder = _Builder(source)
    try:
        for event in yaml.parse(source.text, Loader=loader):
            builder.take(type(event).__name__, event)
    except yaml.YAMLError as problem:
        raise EffcError(_not_yaml(source, problem)) from None
    if builder.root is None:
        raise EffcError(shape(Span(source, 0, 1), "the file is empty", "begin with `effc: 1`"))
    return builder.root


class _Builder:
    """Stacks open collections; a hostile file costs no more than it is long."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.root: Node | None = None
        self.open: list[tuple[Sequence_ | Mapping_, list[Node]]] = []
        self.nodes = self.documents = 0

    def take(self, kind: str, event: Any) -> None:
        span = Span(self.source, event.start_mark.index, event.end_mark.index)
        if kind == "AliasEvent" or getattr(event, "anchor", None):
            self._refuse(
                span, "anchors and aliases", "write the value out, or name it under `let` and use $name"
            )
        tag = getattr(event, "tag", None)
        if tag and not (tag == "!table" and kind == "MappingStartEvent"):
            self._refuse(span, "tags", "take the tag out")
        match kind:
            case "DocumentStartEvent":
                self.documents += 1
                if self.documents > 1:
                    self._refuse(span, "several documents", "put each recipe in a file of its own")
            case "ScalarEvent":
                self._add(Scalar(event.value, not event.style, span))
            case "SequenceStartEvent":
                self._begin(Sequence_([], span), span)
            case "MappingStartEvent":
                self._begin(Mapping_([], span, tag == "!table"), span)
            case "SequenceEndEvent" | "MappingEndEvent":
                self._end(span)

    def _begin(self, node: Sequence_ | Mapping_, span: Span) -> None:
        if len(self.open) >= DEEPEST:
            raise EffcError(
                Diagnostic(
                    "E108",
                    f"values are nested deeper than {DEEPEST}",
                    [Label(span)],
                    help="name the inner values under `let`",
                )
            )
        self.open.append((node, []))

    def _end(self, span: Span) -> None:
        node, children = self.open.pop()
        last = children[-1].span.end if children else node.span.end
        flow = span.end > span.start and self.source.text[span.start : span.end] in ("]", "}")
        node.span = Span(self.source, node.span.start, span.end if flow else last)
        if isinstance(node, Sequence_):
            node.items = children
        else:
            node.items = _pairs(children)
        self._add(node)

    def _add(self, node: Node) -> None:
        self.nodes += 1
        if self.nodes > MOST_NODES:
            raise EffcError(
                Diagnostic("E109", f"the file has more than {MOST_NODES} values", [Label(node.span)])
            )
        if self.open:
            self.open[-1][1].append(node)
        else:
            self.root = node

    def _refuse(self, span: Span, what: str, help_: str) -> None:
        raise EffcError(Diagnostic("E112", f"recipes in YAML have no {what}", [Label(span)], help=help_))


def _pairs(children: Sequence[Node]) -> list[tuple[Scalar, Node]]:
    """Keys and values; a key is a word, and each stands once. Raises EffcError E111, E113."""
    pairs: list[tuple[Scalar, Node]] = []
    seen: dict[str, Scalar] = {}
    for key, value in zip(children[::2], children[1::2], strict=True):
        if not isinstance(key, Scalar):
            raise EffcError(shape(key.span, "a key is one word", "write `name: value`"))
        if key.value in seen:
            labels = [Label(key.span, "given again"), Label(seen[key.value].span, "first given here")]
            raise EffcError(
                Diagnostic("E111", f"the key `{key.value}` is given twice", labels, help="keep one of them")
            )
        if key.value == "<<" and key.plain:
            raise EffcError(
                Diagnostic(
                    "E112",
                    "recipes in YAML have no merge keys",
                    [Label(key.span)],
                    help="write the arguments out",
                )
            )
        seen[key.value] = key
        pairs.append((key, value))
    return pairs


def _not_yaml(source: Source, problem: Any) -> Diagnostic:
    mark = getattr(problem, "problem_mark", None) or getattr(problem, "context_mark", None)
    at = mark.index if mark is not None else getattr(problem, "position", 0) or 0
    at = min(max(at, 0), len(source.text))
    said = getattr(problem, "problem", None) or getattr(problem, "reason", None) or "it does not parse"
    labels = [Label(Span(source, at, at + 1), str(said))]
    context = getattr(problem, "context_mark", None)
    if context is not None and context.index < at:
        labels.append(Label(Span(source, context.index, context.index + 1), str(problem.context)))
    help_ = "quote strings that hold `: `, `#`, or begin with a sign" if "mapping values" in said else None
    return Diagnostic("E110", "this is not YAML", labels, help=help_)


def shape(span: Span, title: str, help_: str | None = None) -> Diagnostic:
    return Diagnostic("E113", title, [Label(span)], help=help_)
