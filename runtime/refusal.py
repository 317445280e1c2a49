"""Refusals: what a class refuses when it is made, in the words that checking a recipe would have used.

Where the catalogue refuses the same argument, its diagnostic is taken; what the class alone can see, such as
two arguments that exclude each other, is told at the arguments that it names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from effc.compiler.placed import placed, written
from effc.dsl import text, tree
from effc.dsl.resolved import call_of
from effc.dsl.scope import Scope
from effc.dsl.unparse import value as printed
from effc.dsl.values import Values
from effc.specs.catalogue import Catalogue, Entry
from effc.specs.diagnostic import Diagnostic, EffcError, Label
from effc.specs.recipe import Call, Ref, refs
from effc.specs.source import Source


def refusals(call: Call, problems: Iterable[Mapping[str, Any]]) -> list[Diagnostic]:
    """Every problem, a pydantic error with `loc` and `msg`, once, where its argument was written."""
    from effc.runtime.catalogue import catalogue

    known = catalogue()
    entry = known.find(call.kind)
    said = dict(_in_words(call, entry, known)) if entry else {}
    found: dict[str, Diagnostic] = {}
    for problem in problems:
        key = str(problem["loc"][0]) if problem["loc"] else ""
        if key not in found or not key:
            told = said.get(key) or _alone(call, dict(problem))
            found[key or told.render()] = told
    return list({told.render(): told for told in found.values()}.values())


def _in_words(call: Call, entry: Entry, known: Catalogue) -> Iterator[tuple[str, Diagnostic]]:
    """Argument -> what the catalogue says about it, from the call printed and read again."""
    node = call_of(replace(call, models=()), known)
    node = replace(node, named=tuple(_as_written(entry, call) for entry in node.named))
    source = Source(call.kind, printed(node))
    again: tree.Call = text.parse_part(source, 0, len(source.text), "value")
    scope = Scope(tree.Document((), source))
    kinds: dict[str, str] = {}
    for key, value in call.arguments.items():
        parameter = entry.parameter(key)
        kind = "data" if parameter is not None and parameter.takes("data") else "model"
        for ref in refs(value) if isinstance(value, Ref | tuple) and parameter else ():
            name = tree.Word(ref.name, again.span)
            scope.bindings[ref.name] = tree.Bind("stage", name, again, again.span)
            kinds[ref.name] = kind
    problems: list[Diagnostic] = []
    Values(scope, known, problems, kinds, set()).call(again, entry, again.values)
    for problem in problems:
        at = problem.labels[0]
        inside = [
            e.key.text for e in again.named if e.span.start <= at.span.start and at.span.end <= e.span.end
        ]
        for key in inside or re.findall(r"`(\w+)`", problem.title):
            span = written(call, key) or at.span
            yield key, replace(problem, labels=[Label(span, at.text)])


def _as_written(entry: tree.Entry, call: Call) -> tree.Entry:
    """The entry with its number in the unit of the recipe, where there is one."""
    if not isinstance(entry.value, tree.Number) or entry.key.text not in call.spans:
        return entry
    written_ = re.split(r"[=:]", call.spans[entry.key.text].text, maxsplit=1)[-1].strip()
    try:
        number = text.parse_part(Source("", written_), 0, len(written_), "value")
    except EffcError:
        return entry
    return replace(entry, value=number) if isinstance(number, tree.Number) else entry


def _alone(call: Call, problem: Mapping[str, Any]) -> Diagnostic:
    """A problem that the class alone can see."""
    words = str(problem["msg"]).removeprefix("Value error, ")
    path = "".join(f"[{at}]" if isinstance(at, int) else f".{at}" for at in problem["loc"]).lstrip(".")
    plain = [key for key, value in call.arguments.items() if key in call.spans and not isinstance(value, Ref)]
    named = [key for key in plain if re.search(rf"\b{re.escape(key)}\b", words)]
    if path or len(named) == 1:
        key = path.partition("[")[0].partition(".")[0] or named[0]
        title = f"`{key}` of `{call.kind}` cannot be this"
        return placed(Diagnostic("E202", title, (), (words,), about=path or key), call)
    labels = [Label(call.spans[key]) for key in named]
    title = f"the arguments of `{call.kind}` do not fit each other"
    return placed(Diagnostic("E325", title, labels, (words,)), call)
