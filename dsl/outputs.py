"""What leaves a recipe: its exports, the places they go to, and expects that would prove nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from posixpath import normpath

from effc.dsl import tree
from effc.dsl.values import Values
from effc.specs.diagnostic import Diagnostic, Label
from effc.specs.recipe import Binding, Export, Recipe, Ref
from effc.specs.source import Span


def read_exports(statement: tree.Export, values: Values) -> Iterator[Export]:
    """The exports of one statement that are right."""
    name = tree.Name(statement.model.text, statement.model.span)
    ref = values.reference(name, "model", "`export`")
    for node in statement.calls:
        entry = values.catalogue.find(node.name.text)
        if entry is None or entry.role != "export":
            formats = [e.kind for e in values.catalogue.of_role("export")]
            near = values.catalogue.near(node.name.text, "export")
            help_ = f"did you mean `{near[0]}`?" if near else f"there are: {', '.join(formats)}"
            values.report(
                "E201", f"no export format is called `{node.name.text}`", node.name.span, help_=help_
            )
            continue
        before = len(values.problems)
        call = values.call(node, entry, node.values)
        if ref and len(values.problems) == before:
            yield Export(ref.name, call, node.span)


def same_places(exports: Sequence[Export], bindings: Sequence[Binding], problems: list[Diagnostic]) -> None:
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


def gates_on_seen_data(recipe: Recipe) -> Iterator[Diagnostic]:
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
