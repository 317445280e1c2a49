"""Numbers: from a literal with its unit to base units within the range of an argument, or why not."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from math import floor

from effc.dsl import tree
from effc.dsl.names import Names
from effc.dsl.place import Place, Unfit
from effc.specs.catalogue import Form
from effc.specs.quantity import DIMENSIONS, EXAMPLES, UNITS, dimensions_of, to_base
from effc.specs.source import Span


def read_number(names: Names, node: tree.Number, place: Place, span: Span) -> float:
    """The number in base units. Raises Unfit after telling why it does not fit."""
    forms = [form for form in place.forms if form.type in ("int", "float")]
    if not forms:
        names.wrong_type(node, place, span)
        raise Unfit
    if node.unit is not None:
        fitting = [form for form in forms if node.unit in DIMENSIONS.get(form.unit or "", {})]
        if not fitting:
            _wrong_unit(names, node, place, forms, span)
            raise Unfit
        forms = fitting
    whole = float(node.text).is_integer()
    forms.sort(key=lambda form: (form.type == "int") != node.text.lstrip("-").isdigit())
    for form in forms:
        value = _in_form(node, form)
        if value is not None and not _outside(value, form):
            return value
    form = next((f for f in forms if f.type == "float" or whole or node.unit), forms[0])
    value = _in_form(node, form)
    if value is None:
        below = floor(float(node.text))
        help_ = f"write {below} or {below + 1}" if abs(below) < 10**15 else None
        names.report("E210", f"{place.title} is a whole number", span, f"not {_shown(node)}", help_)
    else:
        _out_of_range(names, node, value, form, place, span)
    raise Unfit


def _wrong_unit(names: Names, node: tree.Number, place: Place, forms: Sequence[Form], span: Span) -> None:
    unit = node.unit or ""
    measured = dimensions_of(unit)
    wanted = " or ".join(dict.fromkeys(form.unit or "a plain number" for form in forms))
    examples = [EXAMPLES[form.unit] for form in forms if form.unit and form.unit in EXAMPLES]
    if not measured:
        fits = near_unit(unit, [form.unit or "" for form in forms])
        help_ = (
            f"did you mean {node.text} {fits}?"
            if fits
            else (f"write {examples[0]}" if examples else f"write {node.text}")
        )
        names.report("E209", f"`{unit}` is no unit", span, f"{place.title} counts in {wanted}", help_)
        return
    help_ = (
        f"write it as in {place.name} = {examples[0]}" if examples else f"write {place.name} = {node.text}"
    )
    names.report(
        "E209", f"{place.title} is measured in {wanted}", span, f"`{unit}` measures {measured[0]}", help_
    )


def _out_of_range(
    names: Names, node: tree.Number, value: float, form: Form, place: Place, span: Span
) -> None:
    shown = _shown(node) if node.unit else f"{value:g}" if isinstance(value, float) else str(value)[:40]
    help_ = None
    if form.unit == "share" and node.unit is None and 1 < value <= 100:
        help_ = f"write {value:g}% for a share"
    elif form.choices:
        near = min(form.choices, key=lambda c: abs(float(c) - value))
        help_ = f"write {near}"
    else:
        inside = _nearest(value, form)
        help_ = f"write {inside}" if inside else None
    limits = f"one of {', '.join(map(str, form.choices))}" if form.choices else _limits(form)
    names.report("E202", f"{place.title} is out of range", span, f"must be {limits}, not {shown}", help_)


def near_unit(unit: str, dimensions: Sequence[str]) -> str | None:
    """A unit of these dimensions that looks like a word that is none."""
    known = [u for u in UNITS if any(u in DIMENSIONS.get(dimension, {}) for dimension in dimensions)]
    same = [u for u in known if u.lower() == unit.lower()]
    return next(iter([*same, *get_close_matches(unit, known, n=1, cutoff=0.5)]), None)


def _in_form(node: tree.Number, form: Form) -> float | None:
    """The number in base units as this form takes it; None when the form takes only whole numbers."""
    number = int(node.text) if node.text.lstrip("-").isdigit() else float(node.text)
    value = to_base(number, node.unit, form.unit)
    if value is None or form.type == "float":
        return None if value is None else float(value)
    return int(value) if float(value).is_integer() else None


def _outside(value: float, form: Form) -> bool:
    if form.choices:
        return value not in form.choices
    low, high = form.open
    return (form.least is not None and (value < form.least or (low and value == form.least))) or (
        form.greatest is not None and (value > form.greatest or (high and value == form.greatest))
    )


def _limits(form: Form) -> str:
    """The range in words, shares as percentages."""

    def shown(limit: float) -> str:
        return f"{limit * 100:g}%" if form.unit == "share" else f"{limit:g}"

    low, high = form.open
    least = "" if form.least is None else f"{'above' if low else 'at least'} {shown(form.least)}"
    greatest = "" if form.greatest is None else f"{'below' if high else 'at most'} {shown(form.greatest)}"
    return " and ".join(part for part in (least, greatest) if part)


def _nearest(value: float, form: Form) -> str | None:
    """The limit that was crossed, where it is itself allowed."""
    low, high = form.open
    for limit, is_open, crossed in ((form.least, low, -1), (form.greatest, high, 1)):
        if limit is not None and not is_open and (value - limit) * crossed > 0:
            return f"{limit * 100:g}%" if form.unit == "share" else f"{limit:g}"
    return None


def _shown(node: tree.Number) -> str:
    return node.text + (node.unit if node.unit == "%" else f" {node.unit}" if node.unit else "")
