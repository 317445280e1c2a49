"""The YAML surface: the same recipe as a mapping, to the same tree with the same kind of spans."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from effc.dsl import text, tree
from effc.dsl.yaml_nodes import Mapping_, Node, Scalar, Sequence_, compose, shape
from effc.dsl.yaml_values import mapping, read_call, read_value, string, word
from effc.specs.diagnostic import Diagnostic, EffcError, Label
from effc.specs.source import Source, Span

KEYS = ("effc", "recipe", "title", "use", "params", "let", "models", "data", "stages", "expects", "exports")


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
            shape(root.span, "a recipe is a mapping", "begin with `effc: 1`, then `recipe: NAME`")
        ]
    reading = _Reading(source, [], set())
    statements = [s for key, node in root.items for s in reading.section(key, node)]
    return tree.Document(tuple(statements), source, (), frozenset(reading.broken), True), reading.problems


def _names(node: Node) -> set[str]:
    """What a section with the wrong shape may have meant to bind."""
    if isinstance(node, Mapping_):
        return {key.value for key, _ in node.items}
    return {name for item in node.items for name in _names(item)} if isinstance(node, Sequence_) else set()


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
            self.problems.append(shape(key.span, f"a recipe has no key `{key.value}`", help_))
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
        value = read_value(node)
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
                    shape(node.span, "a recipe has `name` and `title`", 'write {name: NAME, title: "..."}')
                )
            title = string(known["title"], "a title") if "title" in known else None
            yield tree.Title(word(known["name"], "the name of the recipe"), title, key.span.to(node.span))
        else:
            yield tree.Title(word(node, "the name of the recipe"), None, key.span.to(node.span))

    def _no_title(self, key: Scalar, node: Node) -> Iterator[tree.Statement]:
        raise EffcError(
            shape(key.span, "the title stands under `recipe`", 'write recipe: {name: NAME, title: "..."}')
        )

    def _uses(self, key: Scalar, node: Node) -> Iterator[tree.Statement]:
        for name, path in mapping(node, "`use`", "{c: common.effc}"):
            yield tree.Use(string(path, "a path"), word(name, "a name"), name.span.to(path.span))

    def _constants(self, keyword: Any) -> Callable[[Scalar, Node], Iterator[tree.Statement]]:
        def read(key: Scalar, node: Node) -> Iterator[tree.Statement]:
            for name, value in mapping(node, f"`{key.value}`", "{steps: 400}"):

                def one(name: Scalar = name, value: Node = value) -> list[Any]:
                    return [
                        tree.Let(keyword, word(name, "a name"), read_value(value), name.span.to(value.span))
                    ]

                yield from self._guard(one, [name.value])

        return read

    def _bindings(self, keyword: Any) -> Callable[[Scalar, Node], Iterator[tree.Statement]]:
        def read(key: Scalar, node: Node) -> Iterator[tree.Statement]:
            example = {"model": '{base: {load: "zoo:pylm"}}', "data": "{code: {corpus: python-stdlib}}"}[
                keyword
            ]
            for name, call in mapping(node, f"`{key.value}`", example):
                yield from self._bind(keyword, name, call)

        return read

    def _stages(self, key: Scalar, node: Node) -> Iterator[tree.Statement]:
        if not isinstance(node, Sequence_):
            raise EffcError(
                shape(node.span, "`stages` is a list", "write - thin: {prune.depth: [$base], keep: 75%}")
            )
        for item in node.items:
            if not isinstance(item, Mapping_) or len(item.items) != 1:
                help_ = "write - NAME: {family.method: [$model], argument: value}"
                self.problems.append(shape(item.span, "a stage is a mapping with one key, its name", help_))
                continue
            yield from self._bind("stage", *item.items[0])

    def _bind(self, keyword: Any, name: Scalar, node: Node) -> Iterator[tree.Statement]:
        def one() -> list[Any]:
            value = read_call(node, True) if isinstance(node, Mapping_) and node.items else read_value(node)
            return [tree.Bind(keyword, word(name, "a name"), value, name.span.to(node.span))]

        yield from self._guard(one, [name.value])

    def _expects(self, key: Scalar, node: Node) -> Iterator[tree.Statement]:
        if not isinstance(node, Sequence_):
            raise EffcError(shape(node.span, "`expects` is a list", 'write ["small.bytes <= 6 MB"]'))
        for item in node.items:
            yield from self._guard(lambda item=item: [self._expect(item)], ())  # type: ignore[misc]

    def _expect(self, node: Node) -> tree.Expect:
        if not isinstance(node, Scalar):
            raise EffcError(shape(node.span, "an expect is a string", 'write "small.bytes <= 6 MB"'))
        inner = Span(node.span.source, node.span.start + (not node.plain), node.span.end - (not node.plain))
        if inner.text == node.value:
            made: tree.Expect = text.parse_part(self.source, inner.start, inner.end, "comparison")
            return made
        aside = Source(self.source.name, node.value)
        again: tree.Expect = text.parse_part(aside, 0, len(node.value), "comparison")
        return again

    def _exports(self, key: Scalar, node: Node) -> Iterator[tree.Statement]:
        for name, calls in mapping(node, "`exports`", "{small: [{artifact: out/small.effc}]}"):
            items = calls.items if isinstance(calls, Sequence_) else [calls]
            made = [c for item in items for c in self._guard(lambda item=item: [read_call(item, True)], ())]  # type: ignore[misc]
            if made:
                yield tree.Export(
                    tree.Word(name.value.removeprefix("$"), name.span), tuple(made), name.span.to(calls.span)
                )

    # ---- values
