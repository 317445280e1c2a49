"""Bindings: one line of a recipe to a checked call of a method, or of a source of models or data."""

from __future__ import annotations

from effc.dsl import tree
from effc.dsl.scope import described
from effc.dsl.values import Values
from effc.specs.catalogue import Catalogue, Entry
from effc.specs.recipe import Binding, Call, Kind, Ref
from effc.specs.source import Span

ROLE_OF = {"model": "model", "data": "data", "stage": "method"}


def read_binding(bind: tree.Bind, values: Values) -> Binding | None:
    """The binding; None after what is wrong was told."""
    node = bind.value
    if not isinstance(node, tree.Call):
        _no_call(bind, values)
        return None
    entry = values.catalogue.find(node.name.text)
    if entry is None or entry.role in ("part", "export", "metric"):
        _unknown(bind, node, entry, values)
        return None
    if not _word_fits(bind, node, entry, values):
        return None
    models, rest = _models(node, entry, values) if entry.role == "method" else ((), node.values)
    call = values.call(node, entry, rest)
    spans = {**call.spans, **_places(node)}
    call = Call(call.kind, call.arguments, models, call.span, spans)
    return Binding(
        values.scope.prefix + bind.name.text, bind.keyword, kind_of(bind, values.catalogue), call, bind.span
    )


def kind_of(bind: tree.Bind, catalogue: Catalogue) -> Kind:
    """What a binding is, as far as its line tells: a misplaced keyword does not spread."""
    entry = catalogue.find(bind.value.name.text) if isinstance(bind.value, tree.Call) else None
    if entry is not None and entry.value in ("model", "data", "report"):
        return entry.value  # type: ignore[return-value]
    return "data" if bind.keyword == "data" else "model"


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
    if why := values.catalogue.broken.get(word.text):
        help_ = "remove or repair the package; `effc methods` lists what is broken"
        values.report("E235", f"`{word.text}` cannot be used", word.span, help_=help_, notes=(why,))
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


def _places(node: tree.Call) -> dict[str, Span]:
    """Where the models stand that a method is given."""
    listed = node.values[0].items if node.values and isinstance(node.values[0], tree.List) else node.values
    return {f"models[{i}]": value.span for i, value in enumerate(listed)}


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
