"""Arguments of a call: names for values without one, and what is unknown or missing, in words."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from effc.dsl import tree
from effc.dsl.names import Names
from effc.dsl.place import short
from effc.specs.catalogue import Entry, Parameter

_SYNONYMS = {
    "keep": ("ratio", "fraction"),
    "bits": ("w_bits", "wbits", "num_bits"),
    "group": ("groupsize", "q_group_size"),
    "samples": ("num_samples", "nsamples", "num_calibration_samples"),
    "except": ("ignore", "exclude", "skip"),
    "select": ("targets", "include", "modules", "on"),
    "steps": ("max_steps", "iterations", "epochs"),
    "rank": ("r",),
    "temperature": ("tau", "T"),
    "wd": ("weight_decay",),
    "lambda": ("scale", "strength"),
}
"""What other tools call an argument."""


def positional(here: Names, node: tree.Call, entry: Entry, values: Sequence[tree.Value]) -> list[tree.Entry]:
    """Values without a name, given the names of the arguments that must be there, in order."""
    names = [p.name for p in entry.parameters if p.required] if entry.role != "method" else []
    if len(values) > len(names):
        extra = values[len(names)]
        named = [p.name for p in entry.parameters if p.name not in names]
        help_ = f"write {named[0]} = {short(extra)}, or another of: {', '.join(named)}" if named else None
        name = entry.short if entry.role == "part" else entry.kind
        title = f"`{name}` takes {_count(len(names))} without a name"
        here.report("E214", title, extra.span, f"not {len(values)}", help_)
    return [
        tree.Entry(tree.Word(name, value.span), value) for name, value in zip(names, values, strict=False)
    ]


def unknown(here: Names, item: tree.Entry, entry: Entry) -> None:
    key = item.key.text
    names = [p.name for p in entry.parameters]
    near = get_close_matches(key, names, n=1, cutoff=0.6) or [n for n in names if key in _SYNONYMS.get(n, ())]
    slots = [p for p in entry.parameters if p.slot and _part_takes(here, p.slot, p.default, key)]
    if near:
        help_ = f"did you mean `{near[0]}`?"
    elif slots:
        help_ = f"it belongs to a part: {slots[0].name} = {slots[0].default}({key} = {short(item.value)})"
    else:
        help_ = f"it has: {', '.join(names) or 'no arguments'}"
    here.report("E203", f"`{entry.kind}` has no argument `{key}`", item.key.span, help_=help_)


def _part_takes(here: Names, slot: str, default: object, key: str) -> bool:
    part = here.catalogue.part(slot, str(default))
    return bool(part and part.parameter(key))


def unknown_part(here: Names, node: tree.Call, slot: str) -> None:
    names = [e.short for e in here.catalogue.of_slot(slot)]
    near = get_close_matches(node.name.text, names, n=1, cutoff=0.6)
    other = next((e for e in here.catalogue.entries if e.role == "part" and e.short == node.name.text), None)
    notes = [f"`{node.name.text}` is a part of {other.slot}"] if other else []
    help_ = f"did you mean `{near[0]}`?" if near else f"there are: {', '.join(names)}"
    if other and other.slot:
        help_ = f"write {other.slot.rpartition('.')[2]} = {other.short}(...)"
    here.report("E201", f"{slot} has no part `{node.name.text}`", node.name.span, help_=help_, notes=notes)


def missing(here: Names, node: tree.Call, entry: Entry, lacking: Sequence[Parameter]) -> None:
    names = " and ".join(f"`{p.name}`" for p in lacking)
    shown = ", ".join(f"{p.name} = {_example(here, p)}" for p in lacking)
    notes = [f"{p.name}: {p.description}" for p in lacking if p.description]
    title = f"`{entry.kind}` needs {names}"
    here.report("E204", title, node.name.span, help_=f"add {shown}", notes=notes)


def _example(here: Names, parameter: Parameter) -> str:
    form = parameter.forms[0]
    if form.type in ("data", "model"):
        bound = [name for name, kind in here.kinds.items() if kind == form.type]
        return bound[0] if bound else "NAME"
    if form.choices:
        return str(form.choices[0])
    number = "100" if parameter.name in ("steps", "samples") else f"{form.least or 1:g}"
    return {"str": '"..."', "int": number, "float": number, "bool": "true", "list": "[...]"}.get(
        form.type, "..."
    )


def _count(n: int) -> str:
    return {0: "no value", 1: "one value"}.get(n, f"{n} values")
