"""The place of a value: which argument it is for, which forms it may take, and these in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from effc.dsl import tree
from effc.specs.catalogue import Entry, Form, Parameter


class Unfit(Exception):
    """A value that does not fit; it was reported, or belongs to a statement that was."""


class Place(NamedTuple):
    """The argument that a value is for, as messages call it, and what it may be."""

    name: str
    of: str
    forms: tuple[Form, ...]
    overrides: tuple[Parameter, ...] = ()
    """For `rules`: the arguments that a rule may set."""
    default: Any = None

    @property
    def title(self) -> str:
        return f"`{self.name}` of `{self.of}`"


def place_of(parameter: Parameter, entry: Entry) -> Place:
    """The place of one argument; `rules` also know what they may set."""
    overrides: tuple[Parameter, ...] = ()
    if parameter.takes("rules"):
        overrides = tuple(p for name in entry.overrides if (p := entry.parameter(name)))
    return Place(parameter.name, entry.kind, parameter.forms, overrides, parameter.default)


def form_of(place: Place, *types: str) -> Form | None:
    return next((form for form in place.forms if form.type in types), None)


def holds(place: Place, type_: str) -> bool:
    """Whether the argument is a list of such items."""
    return any(inner.type == type_ for form in place.forms if form.type == "list" for inner in form.item)


def choices_of(forms: Sequence[Form]) -> list[str]:
    return [c for form in forms for c in form.choices if isinstance(c, str)]


_ANYTHING = (Form("float"), Form("bool"), Form("none"), Form("str"), Form("list"), Form("table"))


def anything(place: Place) -> Place:
    return place._replace(forms=_ANYTHING)


def takes(form: Form) -> str:
    """A form in words, for "takes ..."."""
    if form.choices:
        words = " | ".join(map(str, form.choices))
        return f"the word `{words}`" if len(form.choices) == 1 else words
    plain = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "str": "a string",
        "none": "none",
        "model": "a model",
        "data": "data",
        "selector": "a selector",
        "rules": "a list of rules",
        "table": "a table",
    }
    if form.type == "part":
        return f"a part of {form.slot}"
    if form.type == "list":
        return f"a {form}"
    return f"{plain[form.type]} ({form.unit})" if form.unit else plain[form.type]


def written_default(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple | list) else str(value)


def short(node: tree.Value) -> str:
    text = " ".join(node.span.text.split())
    return text if len(text) <= 40 else "..."
