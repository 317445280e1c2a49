"""The YAML surface: the same recipe as a mapping, to the same tree with the same kind of spans.

An own loader over YAML's events: a mark on every node, duplicate keys refused, no anchors, aliases, tags or
further documents, YAML 1.2 scalars (`no` is a word, `010` no number, `1e-4` one). `$name` means a binding.
A call is a mapping whose first key is its name: {prune.depth: [$base], keep: 75%}.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from effc.dsl import text, tree
from effc.dsl.lexer import DEEPEST
from effc.specs.diagnostic import Diagnostic, EffcError, Label
from effc.specs.source import Source, Span

KEYS = ("effc", "recipe", "title", "use", "params", "let", "models", "data", "stages", "expects", "exports")
MOST_NODES = 100_000

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*\Z")
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)(?P<rest>(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][+-]?[0-9]+)?"
    r"(?:[ \t]*%|[ \t]*(?:[kKMGBT][ \t]+)?[A-Za-z]+)?)\Z"
)
_PATTERN = re.compile(r"[0-9]+:[0-9]+\Z")
_CONSTANTS = {"true": True, "false": False, "none": None, "null": None, "~": None, "": None}
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


def is_yaml(source: Source) -> bool:
    """YAML recipes begin with the key `effc:`, or are files that say so."""
    if source.name.endswith((".yaml", ".yml")):
        return True
    return bool(re.match(r"(?:\s|#[^\n]*\n|---[ \t]*\n)*[\"']?effc[\"']?[ \t]*:", source.text[:20_000]))


def parse(source: Source) -> tuple[tree.Document, list[Diagnostic]]:
    """The tree of everything that has the right shape, and a diagnostic for each thing that has not."""
    try:
        root = compose(source)
    except EffcError as problem:
        return tree.Document((), source, yaml=True), list(problem.diagnostics)
    if not isinstance(root, Mapping_):
        return tree.Document((), source, yaml=True), [
            _shape(root.span, "a recipe is a mapping", "begin with `effc: 1`, then `recipe: NAME`")
        ]
    reading = _Reading(source, [], set())
    statements = [s for key, node in root.items for s in reading.section(key, node)]
    return tree.Document(tuple(statements), source, (), frozenset(reading.broken), True), reading.problems


# ---- events to nodes with marks


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
        raise EffcError(_shape(Span(source, 0, 1), "the file is empty", "begin with `effc: 1`"))
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
            raise EffcError(_shape(key.span, "a key is one word", "write `name: value`"))
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


def _shape(span: Span, title: str, help_: str | None = None) -> Diagnostic:
    return Diagnostic("E113", title, [Label(span)], help=help_)


def _names(node: Node) -> set[str]:
    """What a section with the wrong shape may have meant to bind."""
    if isinstance(node, Mapping_):
        return {key.value for key, _ in node.items}
    return {name for item in node.items for name in _names(item)} if isinstance(node, Sequence_) else set()


# ---- nodes to statements


@dataclass(slots=True)
class _Reading:
    source: Source
    problems: list[Diagnostic]
    broken: set[str]

    def section(self, key: Scalar, node: Node) -> Iterator[tree.Statement]:
        """The statements under one key of the file."""
        read = {
            "effc": self._version,
            "recipe": self._title,
            "title": self._no_title,
            "use": self._uses,
            "params": self._constants("param"),
            "let": self._constants("let"),
            "models": self._bindings("model"),
            "data": self._bindings("data"),
            "stages": self._stages,
            "expects": self._expects,
            "exports": self._exports,
        }.get(key.value)
        if read is None:
            near = get_close_matches(key.value, KEYS, n=1, cutoff=0.6)
            help_ = f"did you mean `{near[0]}`?" if near else f"it has: {', '.join(KEYS)}"
            self.problems.append(_shape(key.span, f"a recipe has no key `{key.value}`", help_))
            self.broken |= _names(node)
            return
        if isinstance(node, Scalar) and node.plain and node.value in ("", "~", "null"):
            return
        yield from self._guard(lambda: list(read(key, node)), _names(node))

    def _guard(self, read: Callable[[], list[Any]], broken: Iterable[str]) -> list[Any]:
        """What `read` gives; its problem is noted, and names it would have bound are marked."""
        try:
            return read()
        except EffcError as problem:
            self.problems += problem.diagnostics
            self.broken |= set(broken)
            return []

    def _version(self, key: Scalar, node: Node) -> Iterator[tree.Statement]:
        value = self.value(node)
        if not isinstance(value, tree.Number):
            raise EffcError(
                Diagnostic("E107", "the version is a number", [Label(node.span)], help="write `effc: 1`")
            )
        yield tree.Version(value, key.span.to(node.span))

    def _title(self, key: Scalar, node: Node) -> Iterator[tree.Statement]:
        """`recipe: NAME`, or {name: NAME, title: "..."}."""
        if isinstance(node, Mapping_):
            known = {k.value: v for k, v in node.items}
            if set(known) - {"name", "title"} or "name" not in known:
                raise EffcError(
                    _shape(node.span, "a recipe has `name` and `title`", 'write {name: NAME, title: "..."}')
                )
            title = self._string(known["title"], "a title") if "title" in known else None
            yield tree.Title(
                self._word(known["name"], "the name of the recipe"), title, key.span.to(node.span)
            )
        else:
            yield tree.Title(self._word(node, "the name of the recipe"), None, key.span.to(node.span))

    def _no_title(self, key: Scalar, node: Node) -> Iterator[tree.Statement]:
        raise EffcError(
            _shape(key.span, "the title stands under `recipe`", 'write recipe: {name: NAME, title: "..."}')
        )

    def _uses(self, key: Scalar, node: Node) -> Iterator[tree.Statement]:
        for name, path in self._mapping(node, "`use`", "{c: common.effc}"):
            yield tree.Use(self._string(path, "a path"), self._word(name, "a name"), name.span.to(path.span))

    def _constants(self, keyword: Any) -> Callable[[Scalar, Node], Iterator[tree.Statement]]:
        def read(key: Scalar, node: Node) -> Iterator[tree.Statement]:
            for name, value in self._mapping(node, f"`{key.value}`", "{steps: 400}"):

                def one(name: Scalar = name, value: Node = value) -> list[Any]:
                    return [
                        tree.Let(
                            keyword, self._word(name, "a name"), self.value(value), name.span.to(value.span)
                        )
                    ]

                yield from self._guard(one, [name.value])

        return read

    def _bindings(self, keyword: Any) -> Callable[[Scalar, Node], Iterator[tree.Statement]]:
        def read(key: Scalar, node: Node) -> Iterator[tree.Statement]:
            example = {"model": '{base: {load: "zoo:pylm"}}', "data": "{code: {corpus: python-stdlib}}"}[
                keyword
            ]
            for name, call in self._mapping(node, f"`{key.value}`", example):
                yield from self._bind(keyword, name, call)

        return read

    def _stages(self, key: Scalar, node: Node) -> Iterator[tree.Statement]:
        if not isinstance(node, Sequence_):
            raise EffcError(
                _shape(node.span, "`stages` is a list", "write - thin: {prune.depth: [$base], keep: 75%}")
            )
        for item in node.items:
            if not isinstance(item, Mapping_) or len(item.items) != 1:
                help_ = "write - NAME: {family.method: [$model], argument: value}"
                self.problems.append(_shape(item.span, "a stage is a mapping with one key, its name", help_))
                continue
            yield from self._bind("stage", *item.items[0])

    def _bind(self, keyword: Any, name: Scalar, node: Node) -> Iterator[tree.Statement]:
        def one() -> list[Any]:
            value = self._call(node, True) if isinstance(node, Mapping_) and node.items else self.value(node)
            return [tree.Bind(keyword, self._word(name, "a name"), value, name.span.to(node.span))]

        yield from self._guard(one, [name.value])

    def _expects(self, key: Scalar, node: Node) -> Iterator[tree.Statement]:
        if not isinstance(node, Sequence_):
            raise EffcError(_shape(node.span, "`expects` is a list", 'write ["small.bytes <= 6 MB"]'))
        for item in node.items:
            yield from self._guard(lambda item=item: [self._expect(item)], ())  # type: ignore[misc]

    def _expect(self, node: Node) -> tree.Expect:
        if not isinstance(node, Scalar):
            raise EffcError(_shape(node.span, "an expect is a string", 'write "small.bytes <= 6 MB"'))
        inner = Span(node.span.source, node.span.start + (not node.plain), node.span.end - (not node.plain))
        if inner.text == node.value:
            made: tree.Expect = text.parse_part(self.source, inner.start, inner.end, "comparison")
            return made
        aside = Source(self.source.name, node.value)
        again: tree.Expect = text.parse_part(aside, 0, len(node.value), "comparison")
        return again

    def _exports(self, key: Scalar, node: Node) -> Iterator[tree.Statement]:
        for name, calls in self._mapping(node, "`exports`", "{small: [{artifact: out/small.effc}]}"):
            items = calls.items if isinstance(calls, Sequence_) else [calls]
            made = [c for item in items for c in self._guard(lambda item=item: [self._call(item, True)], ())]  # type: ignore[misc]
            if made:
                yield tree.Export(
                    tree.Word(name.value.removeprefix("$"), name.span), tuple(made), name.span.to(calls.span)
                )

    # ---- values

    def value(self, node: Node) -> tree.Value:
        match node:
            case Scalar():
                return self._scalar(node)
            case Sequence_():
                return tree.List(tuple(self.value(item) for item in node.items), node.span)
            case Mapping_() if node.items and isinstance(node.items[0][1], Sequence_) and not node.table:
                return self._call(node, False)
        entries = tuple(tree.Entry(self._word(k, "a name"), self.value(v)) for k, v in node.items)
        return tree.Table(entries, node.span)

    def _scalar(self, node: Scalar) -> tree.Value:
        value = node.value
        if not node.plain:
            return tree.Text(value, node.span)
        if value in _CONSTANTS:
            return tree.Constant(_CONSTANTS[value], node.span)
        if value.startswith("$"):
            if not NAME.match(value[1:]):
                raise EffcError(
                    _shape(node.span, f"`{value[:40]}` names no binding", "write $name, or quote the string")
                )
            return tree.Name(value[1:], node.span, True)
        if found := _NUMBER.match(value):
            return text.number(found["sign"].replace("+", ""), found["rest"], node.span)
        if _PATTERN.match(value):
            return tree.Pattern(value, node.span)
        if NAME.match(value):
            return tree.Name(value, node.span, False)
        return tree.Text(value, node.span)

    def _call(self, node: Node, outer: bool) -> tree.Call:
        """{name: values, key: value}; outside, the first value may also be a single one."""
        if not isinstance(node, Mapping_) or not node.items:
            raise EffcError(
                _shape(node.span, "a call is a mapping", "write {prune.depth: [$base], keep: 75%}")
            )
        (name, first), *rest = node.items
        if isinstance(first, Sequence_):
            values = tuple(self.value(item) for item in first.items)
            if outer and len(values) > 1 and all(isinstance(value, tree.Name) for value in values):
                values = (tree.List(values, first.span),)  # merge.linear: [$a, $b] takes a list of models
        elif isinstance(first, Mapping_) and first.items and not first.table:
            inner = ", ".join(f"{k.value}: ..." for k, _ in first.items[:4] if k.value != "model")
            help_ = f"write {{{name.value}: [{'$MODEL' if outer else ''}], {inner}}}"
            raise EffcError(
                _shape(first.span, "arguments stand beside the name of a call, not under it", help_)
            )
        elif isinstance(first, Scalar) and first.plain and first.value in ("", "~", "null"):
            values = ()
        else:
            values = (self.value(first),)
        named = tuple(tree.Entry(self._word(k, "an argument"), self.value(v)) for k, v in rest)
        return tree.Call(self._path(name), values, named, node.span)

    def _mapping(self, node: Node, what: str, example: str) -> list[tuple[Scalar, Node]]:
        if not isinstance(node, Mapping_):
            raise EffcError(_shape(node.span, f"{what} is a mapping", f"write {example}"))
        return node.items

    def _word(self, node: Node, what: str) -> tree.Word:
        if isinstance(node, Scalar) and NAME.match(node.value) and "." not in node.value:
            return tree.Word(node.value, node.span)
        raise EffcError(_shape(node.span, f"{what} is one word of letters, digits and _"))

    def _path(self, node: Scalar) -> tree.Word:
        if NAME.match(node.value):
            return tree.Word(node.value, node.span)
        raise EffcError(_shape(node.span, f"`{node.value[:40]}` names no method, part or source"))

    def _string(self, node: Node, what: str) -> tree.Text:
        if isinstance(node, Scalar):
            return tree.Text(node.value, node.span)
        raise EffcError(_shape(node.span, f"{what} is a string"))
