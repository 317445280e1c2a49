"""Level 1: do names, kinds, units, ranges and parts fit? On the catalogue alone, all problems at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from posixpath import normpath

from effc.dsl import tree
from effc.dsl.expects import expect
from effc.dsl.scope import Scope, described
from effc.dsl.values import Values
from effc.specs.catalogue import Catalogue, Entry
from effc.specs.diagnostic import Diagnostic, Label
from effc.specs.recipe import Binding, Call, Expect, Export, Kind, Recipe, Ref, Value, refs
from effc.specs.source import Span

ROLE_OF = {"model": "model", "data": "data", "stage": "method"}


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
            run.kinds[inner.prefix + name] = _kind(bind, catalogue) if known else "unknown"
            if isinstance(bind.value, tree.Call):
                run.data_kinds |= (
                    {inner.prefix + name: bind.value.name.text} if bind.keyword == "data" else {}
                )
    for inner in scope.all():
        for name, bind in inner.bindings.items():
            before = len(problems)
            made = _binding(inner, bind, run)
            if made is not None and not any(d.severity == "error" for d in problems[before:]):
                run.bindings[inner.prefix + name] = made
    ordered = _ordered(run)
    expects = [
        e for s in scope.document.statements if isinstance(s, tree.Expect) for e in _expect(s, scope, run)
    ]
    exports = [
        e for s in scope.document.statements if isinstance(s, tree.Export) for e in _export(s, scope, run)
    ]
    recipe = Recipe(
        *_head(scope), _params(scope), tuple(ordered), tuple(expects), tuple(exports), scope.document.source
    )
    _same_places(exports, ordered, problems)
    problems += _gates_on_seen_data(recipe)
    problems += _unused(scope, run, bool(expects or exports))
    return recipe


def _kind(bind: tree.Bind, catalogue: Catalogue) -> Kind:
    """What a binding is, as far as its line tells: a misplaced keyword does not spread."""
    entry = catalogue.find(bind.value.name.text) if isinstance(bind.value, tree.Call) else None
    if entry is not None and entry.value in ("model", "data", "report"):
        return entry.value  # type: ignore[return-value]
    return "data" if bind.keyword == "data" else "model"


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


# ---- bindings


def _binding(scope: Scope, bind: tree.Bind, run: _Run) -> Binding | None:
    values = run.values(scope)
    node = bind.value
    if not isinstance(node, tree.Call):
        _no_call(bind, values)
        return None
    entry = run.catalogue.find(node.name.text)
    if entry is None or entry.role in ("part", "export", "metric"):
        _unknown(bind, node, entry, values)
        return None
    if not _word_fits(bind, node, entry, values):
        return None
    models, rest = _models(node, entry, values) if entry.role == "method" else ((), node.values)
    call = values.call(node, entry, rest)
    call = Call(call.kind, call.arguments, models, call.span, call.spans)
    return Binding(scope.prefix + bind.name.text, bind.keyword, _kind(bind, run.catalogue), call, bind.span)


def _no_call(bind: tree.Bind, values: Values) -> None:
    node, name = bind.value, bind.name.text
    written = " ".join(node.span.text.split())
    if bind.keyword != "stage":
        example = 'load("...")' if bind.keyword == "model" else 'corpus("python-stdlib")'
        if isinstance(node, tree.Text):
            example = f'load("{node.value}")' if bind.keyword == "model" else f'text("{node.value}")'
        values.report(
            "E208",
            f"a {bind.keyword} binding calls a source",
            node.span,
            f"not {described(node)}",
            f"write {bind.keyword} {name} = {example}",
        )
    elif isinstance(node, tree.Name) and values.catalogue.find(node.text):
        values.report("E208", "a stage is a call", node.span, help_=f"write {name} = {node.text}(...)")
    elif isinstance(node, tree.Name) and values.scope.binding(node.text):
        values.report(
            "E208",
            "a stage is a call; names are not given twice",
            node.span,
            help_=f"use {node.text} itself where {name} is meant",
        )
    else:
        values.report(
            "E208",
            "a stage is a call of a method",
            node.span,
            f"not {described(node)}",
            f"write let {name} = {written}" if len(written) < 60 else f"write let {name} = ...",
        )


def _unknown(bind: tree.Bind, node: tree.Call, entry: Entry | None, values: Values) -> None:
    word, wanted = (
        node.name,
        {"model": "model source", "data": "data source", "stage": "method"}[bind.keyword],
    )
    if entry is not None:
        use = {"part": f"a part of {entry.slot}", "export": "an export format"}.get(entry.role, "a metric")
        help_ = (
            f"write export MODEL as {entry.kind}(...)"
            if entry.role == "export"
            else "parts fill arguments of stages"
        )
        values.report("E208", f"`{word.text}` is {use}, not a {wanted}", word.span, help_=help_)
        return
    parts = [e for e in values.catalogue.entries if e.role == "part" and e.short == word.text]
    if parts:
        slot = parts[0].slot or ""
        help_ = f"give it to a stage: {slot.rpartition('.')[2]} = {word.text}(...)"
        values.report("E208", f"`{word.text}` is a part of {slot}, not a {wanted}", word.span, help_=help_)
        return
    near = values.catalogue.near(word.text, ROLE_OF[bind.keyword])  # type: ignore[arg-type]
    near = near or values.catalogue.near(word.text)
    family = word.text.partition(".")[0]
    same = [e.kind for e in values.catalogue.entries if e.role == "method" and e.family == family]
    if not near and bind.keyword == "stage" and same:
        help_ = f"{family} has: {', '.join(same)}"
    elif near:
        help_ = "did you mean " + " or ".join(f"`{n}`" for n in near) + "?"
    elif bind.keyword == "stage":
        families = sorted({e.family for e in values.catalogue.of_role("method")})
        help_ = f"families: {', '.join(families)}; `effc methods` lists all"
    else:
        help_ = f"there are: {', '.join(e.kind for e in values.catalogue.of_role(ROLE_OF[bind.keyword]))}"  # type: ignore[arg-type]
    values.report("E201", f"no {wanted} is called `{word.text}`", word.span, help_=help_)


def _word_fits(bind: tree.Bind, node: tree.Call, entry: Entry, values: Values) -> bool:
    """Whether `model`, `data` or no word stands before what the call makes."""
    due = {"method": "stage"}.get(entry.role, entry.role)
    if due == bind.keyword:
        return True
    what = {"stage": "a stage", "model": "a model that is read", "data": "data"}[due]
    line = f"{bind.name.text} = {node.name.text}(...)"
    span = Span(bind.span.source, bind.span.start, bind.name.span.end)
    values.report(
        "E224",
        f"`{node.name.text}` makes {what}",
        span,
        help_=f"write {'' if due == 'stage' else due + ' '}{line}",
    )
    return False


def _models(node: tree.Call, entry: Entry, values: Values) -> tuple[tuple[Ref, ...], tuple[tree.Value, ...]]:
    """The positional models of a method, and the values without a name that are left over."""
    least, most = entry.models
    place = f"`{entry.kind}`"
    if (least, most) == (1, 1):
        if not node.values:
            named = next(
                (
                    e
                    for e in node.named
                    if e.key.text in ("model", "on", "base", "student")
                    and entry.parameter(e.key.text) is None
                ),
                None,
            )
            first = next((n for n, k in values.kinds.items() if k == "model"), "MODEL")
            if named is None:
                values.report(
                    "E204",
                    f"{place} needs the model it works on",
                    node.name.span,
                    help_=f"name it first: {entry.kind}({first}, ...)",
                )
            return (), ()
        return tuple(_one_model(node.values[0], place, values)), node.values[1:]
    if len(node.values) == 1 and isinstance(node.values[0], tree.List):
        items, span, rest = node.values[0].items, node.values[0].span, ()
    elif node.values and all(isinstance(value, tree.Name) for value in node.values):
        names = ", ".join(value.text for value in node.values if isinstance(value, tree.Name))
        if least > 1 or len(node.values) > 1:
            values.report(
                "E214",
                f"{place} takes its models as a list",
                node.values[0].span.to(node.values[-1].span),
                help_=f"write [{names}]",
            )
            for value in node.values:
                _one_model(value, place, values)
            return (), ()
        items, span, rest = node.values, node.span, ()
    else:
        bound = [n for n, k in values.kinds.items() if k == "model"][: max(least, 2)]
        values.report(
            "E204",
            f"{place} needs the models it works on",
            node.name.span,
            help_=f"name them first: {entry.kind}([{', '.join(bound)}], ...)",
        )
        return (), node.values
    found = [ref for item in items for ref in _one_model(item, place, values)]
    if not least <= len(items) <= (most or len(items)):
        wanted = f"{least}" if most == least else f"{least} to {most}" if most else f"at least {least}"
        values.report("E214", f"{place} takes {wanted} models", span, f"not {len(items)}")
    return tuple(found), rest


def _one_model(node: tree.Value, place: str, values: Values) -> list[Ref]:
    if isinstance(node, tree.Name):
        ref = values.reference(node, "model", place)
        return [ref] if ref else []
    if isinstance(node, tree.Call):
        help_ = f"bind it on a line of its own: NAME = {node.name.text}(...)"
    elif isinstance(node, tree.Text):
        help_ = f'bind it on a line of its own: model NAME = load("{node.value}")'
    else:
        help_ = "name it first"
    values.report("E210", f"{place} takes the name of a model", node.span, f"not {described(node)}", help_)
    return []


def _ordered(run: _Run) -> list[Binding]:
    """Bindings so that each comes after those it names, otherwise as written; a circle is reported."""
    graph = {
        name: [ref.name for ref in (*binding.call.models, *refs(binding.call.arguments))]
        for name, binding in run.bindings.items()
    }
    _drop_orphans(run.bindings, graph)
    order = list(run.bindings)
    try:
        sorter = TopologicalSorter(graph)
        sorter.prepare()
    except CycleError as circle:
        names: list[str] = list(dict.fromkeys(reversed(circle.args[1])))
        start = min(range(len(names)), key=lambda i: order.index(names[i]))
        names = names[start:] + names[:start]
        first = run.bindings[names[0]]
        arrow = " -> ".join((*names, names[0]))
        title = f"`{names[0]}` needs itself" if len(names) == 1 else "stages need each other in a circle"
        labels = [Label(b.span) for n in names if (b := run.bindings[n]).span] or [Label(first.span)]  # type: ignore[arg-type]
        run.problems.append(
            Diagnostic(
                "E207",
                title,
                labels[:4],
                [f"{arrow}, where -> is needs"] if len(names) > 1 else [],
                help=f"let `{names[0]}` start from a model that is loaded{_such_as(run)}",
            )
        )
        return []
    rank = {name: place for place, name in enumerate(order)}
    done: list[Binding] = []
    while sorter.is_active():
        ready = sorted(sorter.get_ready(), key=rank.__getitem__)
        done += [run.bindings[name] for name in ready]
        sorter.done(*ready)
    return _stable(done, graph, rank)


def _such_as(run: _Run) -> str:
    loaded = [name for name, binding in run.bindings.items() if binding.keyword == "model"]
    return f", such as {loaded[0]}" if loaded else ""


def _drop_orphans(bindings: dict[str, Binding], graph: dict[str, list[str]]) -> None:
    """Take out bindings that need one that has an error, and what needs those."""
    users: dict[str, list[str]] = {}
    for name, needs in graph.items():
        for need in needs:
            users.setdefault(need, []).append(name)
    todo = [need for need in users if need not in bindings]
    while todo:
        for user in users.get(todo.pop(), ()):
            if user in bindings:
                del bindings[user], graph[user]
                todo.append(user)


def _stable(bindings: Sequence[Binding], graph: dict[str, list[str]], rank: dict[str, int]) -> list[Binding]:
    """Keep the order of the page where it is already an order of making."""
    place = {b.name: rank[b.name] for b in bindings}
    forward = all(place[need] < place[name] for name, needs in graph.items() for need in needs)
    return sorted(bindings, key=lambda b: rank[b.name]) if forward else list(bindings)


# ---- expects and exports


def _expect(statement: tree.Expect, scope: Scope, run: _Run) -> Iterator[Expect]:
    made = expect(statement, run.values(scope), run.data_kinds)
    if made:
        yield made


def _export(statement: tree.Export, scope: Scope, run: _Run) -> Iterator[Export]:
    values = run.values(scope)
    name = tree.Name(statement.model.text, statement.model.span)
    ref = values.reference(name, "model", "`export`")
    for node in statement.calls:
        entry = run.catalogue.find(node.name.text)
        if entry is None or entry.role != "export":
            formats = [e.kind for e in run.catalogue.of_role("export")]
            near = run.catalogue.near(node.name.text, "export")
            help_ = f"did you mean `{near[0]}`?" if near else f"there are: {', '.join(formats)}"
            values.report(
                "E201", f"no export format is called `{node.name.text}`", node.name.span, help_=help_
            )
            continue
        before = len(run.problems)
        call = values.call(node, entry, node.values)
        if ref and len(run.problems) == before:
            yield Export(ref.name, call, node.span)


def _same_places(exports: Sequence[Export], bindings: Sequence[Binding], problems: list[Diagnostic]) -> None:
    """Two exports may not write to one place, and none over what is loaded."""
    places: dict[str, Span] = {}
    for binding in bindings:
        path = binding.call.arguments.get("path")
        if binding.call.kind == "load" and isinstance(path, str) and ":" not in path and binding.call.span:
            places[normpath(path)] = binding.call.spans.get("path", binding.call.span)
    for export in exports:
        path = export.call.arguments.get("path")
        span = export.call.spans.get("path", export.span)
        if not isinstance(path, str) or span is None:
            continue
        place = normpath(path)
        if place in places:
            labels = [Label(span, "written here"), Label(places[place], "and this is there already")]
            problems.append(
                Diagnostic("E223", f"two things lie at `{place}`", labels, help="choose another path")
            )
        places.setdefault(place, span)


def _gates_on_seen_data(recipe: Recipe) -> Iterator[Diagnostic]:
    """An expect on held-out data that a stage before it was given by name proves nothing."""
    known = {binding.name: binding for binding in recipe.bindings}
    for item in recipe.expects:
        for metric in item.metrics():
            if metric.data is None or metric.model not in known:
                continue
            line = [metric.model, *sorted(recipe.ancestors(metric.model))]
            seen = [
                (known[name], ref)
                for name in line
                for ref in recipe.inputs_of(known[name])
                if known[name].keyword == "stage" and ref == Ref(metric.data.name, "heldout")
            ]
            if seen and item.span and seen[0][0].span:
                stage = seen[0][0]
                labels = [Label(item.span), Label(_where(stage), f"`{stage.name}` reads it")]
                yield Diagnostic(
                    "E221",
                    f"`{metric}` is judged on data that a stage has seen",
                    labels,
                    help=f"let `{stage.name}` read {metric.data.name}",
                )


def _where(binding: Binding) -> Span:
    span = binding.call.spans.get("data") or binding.span
    assert span is not None
    return span


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
