"""Level 1: do names, kinds, units, ranges and parts fit? On the catalogue alone, all problems at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from effc.dsl import tree
from effc.dsl.binding import kind_of, read_binding
from effc.dsl.expects import expect
from effc.dsl.outputs import gates_on_seen_data, read_exports, same_places
from effc.dsl.scope import Scope
from effc.dsl.sequence import in_order
from effc.dsl.values import Values
from effc.specs.catalogue import Catalogue
from effc.specs.diagnostic import Diagnostic, Label
from effc.specs.recipe import Binding, Expect, Recipe, Value


@dataclass(slots=True)
class _Run:
    """What one check gathers."""

    catalogue: Catalogue
    problems: list[Diagnostic]
    kinds: dict[str, str] = field(default_factory=dict)
    data_kinds: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    bindings: dict[str, Binding] = field(default_factory=dict)

    def values(self, scope: Scope) -> Values:
        return Values(scope, self.catalogue, self.problems, self.kinds, self.used)


def check(scope: Scope, catalogue: Catalogue, problems: list[Diagnostic]) -> Recipe:
    """The recipe as far as it is right; what is wrong is added to `problems`.

    Only when no error was added may the recipe be used as a whole; level 2 looks at the part that is right.
    """
    run = _Run(catalogue, problems)
    for inner in scope.all():
        for name, bind in inner.bindings.items():
            known = isinstance(bind.value, tree.Call)
            run.kinds[inner.prefix + name] = kind_of(bind, catalogue) if known else "unknown"
            if isinstance(bind.value, tree.Call):
                run.data_kinds |= (
                    {inner.prefix + name: bind.value.name.text} if bind.keyword == "data" else {}
                )
    for inner in scope.all():
        for name, bind in inner.bindings.items():
            before = len(problems)
            made = read_binding(bind, run.values(inner))
            if made is not None and not any(d.severity == "error" for d in problems[before:]):
                run.bindings[inner.prefix + name] = made
    ordered = in_order(run.bindings, problems)
    statements = scope.document.statements
    outer = run.values(scope)
    expects = [e for s in statements if isinstance(s, tree.Expect) for e in _expect(s, scope, run)]
    exports = [e for s in statements if isinstance(s, tree.Export) for e in read_exports(s, outer)]
    recipe = Recipe(
        *_head(scope), _params(scope), tuple(ordered), tuple(expects), tuple(exports), scope.document.source
    )
    same_places(exports, ordered, problems)
    problems += gates_on_seen_data(recipe)
    told = any(kind == "report" for kind in run.kinds.values())
    problems += _unused(scope, run, bool(expects or exports or told))
    return recipe


def _head(scope: Scope) -> tuple[str, str, int]:
    for statement in scope.document.statements:
        if isinstance(statement, tree.Title):
            return statement.name.text, statement.title.value if statement.title else "", 1
    return scope.document.source.name.rpartition("/")[2].partition(".")[0] or "recipe", "", 1


def _params(scope: Scope) -> dict[str, Value]:
    return {
        name: _written(constant.value)
        for name, constant in scope.constants.items()
        if constant.statement.keyword == "param"
    }


def _written(value: tree.Value) -> Value:
    """A param for reports: plain where it is plain, else as written."""
    match value:
        case tree.Number(unit=None, text=text):
            return int(text) if text.lstrip("-").isdigit() else float(text)
        case tree.Number(text=text, unit=unit):
            return f"{text}%" if unit == "%" else f"{text} {unit}"
        case tree.Text(value=inner):
            return inner
        case tree.Constant(value=inner_constant):
            return inner_constant
    return " ".join(value.span.text.split())


def _expect(statement: tree.Expect, scope: Scope, run: _Run) -> Iterator[Expect]:
    made = expect(statement, run.values(scope), run.data_kinds)
    if made:
        yield made


def _unused(scope: Scope, run: _Run, shows: bool) -> Iterator[Diagnostic]:
    """What nothing refers to; told only when all names are known to be right."""
    if scope.document.broken or any(d.severity == "error" for d in run.problems):
        return
    if scope.bindings and not shows:
        last = list(scope.bindings.values())[-1].name.text
        help_ = f'add export {last} as artifact("out/{last}.effc")'
        yield Diagnostic(
            "W203", "the recipe exports nothing and expects nothing", help=help_, severity="warning"
        )
    for name, bind in scope.bindings.items():
        if name in run.used or not shows:
            continue
        what, help_ = str(bind.keyword), "take the line out"
        if run.kinds[scope.prefix + name] == "report":  # a report is told whether or not something asks
            continue
        if what == "stage":
            what, help_ = "result", f'add export {name} as artifact("out/{name}.effc"), or {help_}'
        yield _never_used("W201", what, bind.name, help_)
    for constant in scope.constants.values():
        if not constant.used:
            statement = constant.statement
            yield _never_used("W202", statement.keyword, statement.name, "take the line out")


def _never_used(code: str, what: str, name: tree.Word, help_: str) -> Diagnostic:
    title = f"the {what} `{name.text}` is never used"
    return Diagnostic(code, title, [Label(name.span)], help=help_, severity="warning")
