"""Level 2: may the stages follow each other? Facts flow along the models, and contracts are held to them.

A fact about a region holds, fails, or is unknown until the model's own names are read (level 3). Only what
certainly fails is reported here, with an order that would be legal where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from effc.dsl.held import Held, State, after, arguments_of, loaded, shared, survives
from effc.dsl.region import overlap, region_of, selected
from effc.specs.catalogue import Catalogue, Entry
from effc.specs.diagnostic import Diagnostic, Label
from effc.specs.facts import Claim, claim, export_rules, facts, promised
from effc.specs.recipe import Binding, Export, Recipe, Ref
from effc.specs.source import Span


def check_order(recipe: Recipe, catalogue: Catalogue) -> list[Diagnostic]:
    """Everything that is certainly wrong in the order of stages and exports."""
    found: list[Diagnostic] = []
    states: dict[str, State] = {}
    known = {binding.name: binding for binding in recipe.bindings}
    for binding in recipe.bindings:
        if binding.keyword == "data":
            continue
        entry = catalogue.find(binding.call.kind)
        if entry is None:
            continue
        if entry.role == "model":
            states[binding.name] = loaded(binding)
            continue
        before = [states.get(ref.name, ()) for ref in binding.call.models]
        found += _needs(binding, entry, before, known, catalogue)
        found += _losses(binding, entry, before, known, catalogue)
        states[binding.name] = after(binding, entry, before)
    for export in recipe.exports:
        if export.model in states:  # else an error was told about it, or about what it is made from
            found += _export(export, states[export.model], known, catalogue)
    found += _unhealed(recipe, catalogue)
    return found


def _needs(
    binding: Binding,
    entry: Entry,
    before: Sequence[State],
    known: Mapping[str, Binding],
    catalogue: Catalogue,
) -> Iterator[Diagnostic]:
    """Needs that certainly fail, one diagnostic for each stage that is in the way."""
    arguments = arguments_of(binding.call, entry)
    needs = [c for c in map(claim, entry.needs) if c.applies(arguments)]
    if entry.contract == "TRAIN" and not any("adapter" in text for text in entry.gives):
        needs.append(Claim("trainable", "model"))
    told: set[str] = set()
    for need in needs:
        region = region_of(need, binding.call)
        for ref, state in zip(binding.call.models, before, strict=True):
            if not facts()[need.fact].loaded:
                if not any(need.fact in (h.fact, *facts()[h.fact].implies) for h in state):
                    yield _never_given(binding, need, ref)
                continue
            if any(need.fact in facts()[held.fact].implies for held in state):
                continue
            for held in state:
                wrong = need.fact in facts()[held.fact].excludes and overlap(held.region, region)
                if wrong and held.by not in told:
                    told.add(held.by)
                    yield _in_the_way(binding, need, held, known, catalogue)


def _losses(
    binding: Binding,
    entry: Entry,
    before: Sequence[State],
    known: Mapping[str, Binding],
    catalogue: Catalogue,
) -> Iterator[Diagnostic]:
    """Work of earlier stages that this one would undo."""
    kept = {claim(text).fact for text in entry.keeps}
    broken = {claim(text).fact for text in entry.breaks}
    told: set[str] = set()
    for held in shared(before):
        kind = facts()[held.fact]
        lost = held.fact in broken or not survives(held, entry, kept)
        if not lost or held.by in told or kind.of != "values" or _refused(entry, held, binding):
            continue
        if not _touches(binding, entry, held):
            continue
        told.add(held.by)
        giver = known[held.by]
        swap = _legal_swap(giver, binding, catalogue)
        labels = [
            Label(_call_span(binding), f"`{binding.name}` rewrites them"),
            Label(_call_span(giver), "given here"),
        ]
        title = f"`{binding.call.kind}` would undo what `{giver.call.kind}` did"
        notes = [
            f"after `{held.by}` the weights {kind.says}: {held.fact}",
            f"`{entry.kind}` does not keep that",
        ]
        if swap:
            yield Diagnostic("E304", title, labels, notes, f"a legal order is:\n{swap}")
        else:
            yield Diagnostic("W205", title, labels, notes, "expect no saving from it", "warning")


def _refused(entry: Entry, held: Held, binding: Binding) -> bool:
    """Whether a need of the stage already fails because of this fact, so that it is not told twice."""
    needs = {claim(text).fact for text in entry.needs} | (
        {"trainable"} if entry.contract == "TRAIN" else set()
    )
    return bool(needs & set(facts()[held.fact].excludes))


def _touches(binding: Binding, entry: Entry, held: Held) -> bool:
    """Whether the stage certainly writes weights where the fact holds."""
    if entry.parameter("select") is None:
        return True
    return overlap(held.region, selected(binding.call)) is True


def _in_the_way(
    binding: Binding, need: Claim, held: Held, known: Mapping[str, Binding], catalogue: Catalogue
) -> Diagnostic:
    kind, giver = facts()[held.fact], known[held.by]
    labels = [
        Label(_call_span(binding), f"needs {need.fact} weights"),
        Label(_call_span(giver), f"from here on the weights {kind.says}"),
    ]
    title = f"`{binding.call.kind}` cannot follow `{giver.call.kind}`"
    if kind.cure and catalogue.find(kind.cure):
        whole = f"{held.by}_folded"
        models = [whole if ref.name == held.by else str(ref) for ref in binding.call.models]
        takes = models[0] if len(models) == 1 else f"[{', '.join(models)}]"
        lines = (f"{whole} = {kind.cure}({held.by})", f"{binding.name} = {binding.call.kind}({takes}, ...)")
        help_ = "fold it in first:\n" + "\n".join(lines)
    elif giver.call.kind == binding.call.kind or _family(giver) == _family(binding) == "quantize":
        help_ = (
            f"quantize once: use rules for other bits in places, or take `{binding.name}` or `{held.by}` out"
        )
    elif swap := _legal_swap(giver, binding, catalogue, lossless=False):
        help_ = f"a legal order is:\n{swap}"
    elif need.fact == "trainable" and catalogue.find("adapt.lora"):
        help_ = f"train before `{held.by}`, or train an adapter: {binding.name} = adapt.lora({held.by}, ...)"
    else:
        help_ = (
            f"let `{binding.name}` start from {giver.call.models[0]}"
            if giver.call.models
            else "leave one of them out"
        )
    return Diagnostic("E301", title, labels, help=help_)


def _never_given(binding: Binding, need: Claim, ref: Ref) -> Diagnostic:
    label = Label(_call_span(binding), f"needs models whose weights {facts()[need.fact].says}")
    help_ = {
        "adapter": f'put adapt.lora(...) before it, or read one: adapter("...", on = {ref.name})',
        "carved": "put moe.carve(...) before it",
        "gated": "train its gate: moe.phatgoose_gate(..., data = ...)",
        "ensemble": "put moe.ewa(...) and a training stage before it",
    }.get(need.fact, f"let a stage give {need.fact} before")
    return Diagnostic("E301", f"`{binding.call.kind}` finds no {need.fact} in `{ref}`", [label], help=help_)


def _legal_swap(first: Binding, second: Binding, catalogue: Catalogue, lossless: bool = True) -> str | None:
    """The two stages the other way round, as lines, if their contracts allow that."""
    one, two = catalogue.find(first.call.kind), catalogue.find(second.call.kind)
    if one is None or two is None or one.role != "method" or not first.call.models:
        return None
    left = after(second, two, [()])
    if any(_needs(first, one, [left] * len(first.call.models), {second.name: second}, catalogue)):
        return None
    kept = {claim(text).fact for text in one.keeps}
    if lossless and any(not survives(held, one, kept) and _touches(first, one, held) for held in left):
        return None
    start = str(first.call.models[0])
    others = [str(ref) for ref in second.call.models if ref.name != first.name]
    takes = f"[{', '.join([start, *others])}]" if two.models[1] != 1 else start
    return f"{second.name} = {two.kind}({takes}, ...)\n{first.name} = {one.kind}({second.name}, ...)"


def _export(
    export: Export, state: State, known: Mapping[str, Binding], catalogue: Catalogue
) -> Iterator[Diagnostic]:
    rule = export_rules().get(export.call.kind)
    if rule is None or (rule.unless and export.call.arguments.get(rule.unless) is True):
        return
    have = {e.kind for e in catalogue.of_role("export")}
    instead = [name for name in rule.instead if name in have]
    fits = [n for n in instead if _holds(n, state)]
    span = export.call.span or export.span
    assert span is not None
    for held in state:
        if held.fact in rule.refuses:
            others = " or ".join(f"{name}(...)" for name in fits)
            help_ = f"export as {others}" if others else "leave this format out"
            entry = catalogue.find(export.call.kind)
            if rule.unless and entry and entry.parameter(rule.unless):
                help_ += f", or write {rule.unless} = true to store plain numbers again"
            cure = facts()[held.fact].cure
            if cure and catalogue.find(cure):
                help_ = f"fold it in first: {held.by}_folded = {cure}({export.model})"
            label = Label(_call_span(known[held.by]), f"from here on the weights {facts()[held.fact].says}")
            title = f"`{export.call.kind}` cannot hold {held.fact} weights"
            yield Diagnostic("E303", title, [Label(span), label], help=help_)
            return
    for need in rule.needs:
        if not any(need == held.fact for held in state):
            title = f"`{export.call.kind}` holds {need} weights, and `{export.model}` has none"
            others = " or ".join(f"{name}(...)" for name in fits)
            yield Diagnostic("E303", title, [Label(span)], help=f"export as {others}" if others else None)


def _holds(name: str, state: State) -> bool:
    rule = export_rules().get(name)
    given = {held.fact for held in state}
    return rule is None or (not given & set(rule.refuses) and set(rule.needs) <= given)


def _unhealed(recipe: Recipe, catalogue: Catalogue) -> Iterator[Diagnostic]:
    """Stages meant to be trained afterwards that no training follows."""
    children: dict[str, list[Binding]] = {}
    for binding in recipe.bindings:
        for ref in binding.call.models:
            children.setdefault(ref.name, []).append(binding)
    for binding in recipe.bindings:
        entry = catalogue.find(binding.call.kind)
        if entry is None or promised(entry.contract, arguments_of(binding.call, entry)) != "HEALED":
            continue
        todo, seen = [binding.name], set[str]()
        while todo:
            name = todo.pop()
            for child in children.get(name, ()):
                if child.name not in seen:
                    seen.add(child.name)
                    todo.append(child.name)
        later = [e for b in recipe.bindings if b.name in seen and (e := catalogue.find(b.call.kind))]
        if not any(e.contract == "TRAIN" for e in later):
            data = next((b.name for b in recipe.bindings if b.value == "data"), "DATA")
            base = next((b.name for b in recipe.bindings if b.keyword == "model"), "MODEL")
            arguments = f"{binding.name}, teacher = {base}, data = {data}, steps = 200"
            help_ = f"heal it: {binding.name}_healed = distill.logits({arguments})"
            yield Diagnostic(
                "W204",
                f"`{binding.name}` is not trained after `{entry.kind}`",
                [Label(_call_span(binding))],
                ["its loss is far off until a training stage heals it"],
                help_,
                "warning",
            )


def _family(binding: Binding) -> str:
    return binding.call.kind.partition(".")[0]


def _call_span(binding: Binding) -> Span:
    """The method's name where it was written."""
    span = binding.call.span or binding.span
    assert span is not None
    return Span(span.source, span.start, min(span.end, span.start + len(binding.call.kind)))
