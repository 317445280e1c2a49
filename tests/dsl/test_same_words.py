"""The catalogue and the class it was read from: one verdict, one wording, on every golden recipe.

The catalogue refuses arguments without importing torch; the class refuses them again when a stage is made.
Here every call of every golden recipe goes to its class as well, unchecked.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from effc import passes
from effc.dsl import tree
from effc.dsl.check import check
from effc.dsl.files import Reader, read_source
from effc.dsl.read import parse
from effc.dsl.scope import Scope, build
from effc.runtime.bind import HOMES, made, spec_class
from effc.runtime.catalogue import catalogue
from effc.specs.base import Spec
from effc.specs.catalogue import Entry
from effc.specs.diagnostic import Diagnostic, EffcError
from effc.specs.quantity import dimensions_of, to_base
from effc.specs.recipe import Call, Ref

GOLDEN = Path(__file__).parent.parent / "golden"
RECIPES = sorted(p for p in GOLDEN.rglob("*") if p.suffix in (".effc", ".yaml"))
SEEN = {"E202", "E203", "E204", "E215"}
"""Problems of arguments that a class can see; the rest is about text, names, kinds and units."""


def value_of(node: tree.Value, scope: Scope) -> Any:
    """What the argument would be if nothing were checked."""
    match node:
        case tree.Name() if found := scope.constant(node.text):
            return value_of(found[1].value, scope)
        case tree.Name() if scope.binding(node.text):
            return Ref(node.text)
        case tree.Name() | tree.Pattern():
            return node.text
        case tree.Number():
            number = int(node.text) if node.text.lstrip("-").isdigit() else float(node.text)
            dimensions = dimensions_of(node.unit or "")
            return to_base(number, node.unit, dimensions[0]) if dimensions else number
        case tree.List():
            return tuple(value_of(item, scope) for item in node.items)
        case tree.Table():
            return {entry.key.text: value_of(entry.value, scope) for entry in node.entries}
        case tree.Text() | tree.Constant():
            return node.value
    raise LookupError("a part, which is checked on its own")


def class_of(entry: Entry) -> type[Spec]:
    if entry.role == "method":
        return passes.resolve(entry.kind)
    home = "effc.runtime.parts" if entry.role == "part" else HOMES[entry.role]
    return spec_class(f"{home}.{entry.kind}")


def calls(node: tree.Call, entry: Entry | None) -> Iterator[tuple[tree.Call, Entry]]:
    """A call of a recipe and the parts inside it, each with its entry."""
    if entry is None:
        return
    yield node, entry
    for item in node.named:
        parameter = entry.parameter(item.key.text)
        slot = next((form.slot for form in parameter.forms if form.slot), None) if parameter else None
        if slot and isinstance(item.value, tree.Call):
            yield from calls(item.value, catalogue().part(slot, item.value.name.text))


def all_calls(document: tree.Document) -> Iterator[tuple[tree.Call, Entry]]:
    for statement in document.statements:
        if isinstance(statement, tree.Bind) and isinstance(statement.value, tree.Call):
            yield from calls(statement.value, catalogue().find(statement.value.name.text))
        if isinstance(statement, tree.Export):
            for node in statement.calls:
                yield from calls(node, catalogue().find(node.name.text))


def as_call(node: tree.Call, entry: Entry, scope: Scope) -> Call | None:
    """The call without any check; None where it holds positional values or parts, or names one twice."""
    keys = [item.key.text for item in node.named]
    least = 1 if entry.role == "method" else 0
    if len(node.values) != least or len(set(keys)) < len(keys):
        return None
    try:
        arguments = {item.key.text: value_of(item.value, scope) for item in node.named}
    except LookupError:
        return None
    return Call(entry.kind, arguments, (), node.span, {item.key.text: item.span for item in node.named})


def told(problems: list[Diagnostic], node: tree.Call) -> list[Diagnostic]:
    """Problems of this call's own arguments."""
    start, end = node.span.start, node.span.end
    return [
        p for p in problems if p.labels and start <= p.labels[0].span.start and p.labels[0].span.end <= end
    ]


def words(problem: Diagnostic) -> tuple[str, str, str | None]:
    return problem.code, problem.title, problem.labels[0].text


def pairs(recipe: Path) -> Iterator[tuple[list[Diagnostic], list[Diagnostic]]]:
    """What the catalogue and what the class says about each call of the recipe."""
    try:
        document, problems = parse(read_source(recipe))
    except EffcError:
        return
    if problems:
        return
    scope = build(document, {}, problems, Reader(parse))
    check(scope, catalogue(), problems)
    if any(p.code == "E207" for p in problems):  # a circle of constants means no value
        return
    for node, entry in all_calls(document):
        call = as_call(node, entry, scope)
        if call is None:
            continue
        try:
            made(class_of(entry), call)
            refused: list[Diagnostic] = []
        except EffcError as problem:
            refused = list(problem.diagnostics)
        yield told(problems, node), refused


def class_alone(problem: Diagnostic) -> bool:
    """What no catalogue can know: arguments that exclude each other, conditions in code."""
    return problem.code == "E325" or "cannot be this" in problem.title


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.name)
def test_verdicts_and_words(recipe: Path) -> None:
    for by_catalogue, by_class in pairs(recipe):
        seen = sorted(words(p) for p in by_catalogue if p.code in SEEN)
        also = sorted(words(p) for p in by_class if p.code in SEEN and not class_alone(p))
        if any(p.code not in SEEN for p in by_catalogue):  # a wrong name or unit, which the class cannot tell
            assert set(also) >= set(seen)
        else:
            assert also == seen


def test_enough_is_compared() -> None:
    compared = [pair for recipe in RECIPES for pair in pairs(recipe)]
    assert len(compared) > 100
    assert sum(bool(by_class) for _, by_class in compared) >= 8
