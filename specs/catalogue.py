"""Catalogue: the methods, parts, sources and exports there are, as data: checking imports none of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from functools import cached_property
from typing import Any, Literal, Self

EntryRole = Literal["method", "part", "data", "model", "export", "metric"]


@dataclass(frozen=True, slots=True)
class Form:
    """One thing an argument may be: `keep = 75%` (a share) and `keep = 2` (a count) are two forms."""

    type: str
    """"int", "float", "bool", "str", "none", "word" (one of `choices`), "pattern" (2:4), "selector", "rules",
    "model", "data", "part" (fills `slot`), "list" (of `item`), "table"."""
    unit: str | None = None
    """A dimension of `specs/quantity.py`."""
    least: float | None = None
    greatest: float | None = None
    open: tuple[bool, bool] = (False, False)
    """Whether `least` and `greatest` themselves are left out."""
    choices: tuple[str | int | float, ...] = ()
    slot: str | None = None
    """The folder under `runtime/parts` whose parts fit, e.g. "train.optimizer"."""
    item: tuple[Form, ...] = ()
    """What the items of a list may be; () allows anything."""
    length: tuple[int | None, int | None] = (None, None)
    """Fewest and most items of a list, or characters of a string."""
    gradient: bool = False
    """Whether `depth(first, last)` may stand for the number."""

    def __str__(self) -> str:
        """In words: "share", "whole number", "list of strings", "symmetric | asymmetric"."""
        if self.choices:
            return " | ".join(str(choice) for choice in self.choices)
        if self.type == "list":
            inside = " or ".join(str(form) for form in self.item) or "value"
            return f"list of {inside}" + ("" if inside == "data" else "s")
        if self.type == "part":
            return f"part of {self.slot}"
        return self.unit or _WORDS.get(self.type, self.type)

    @property
    def limits(self) -> str:
        """The range in words, e.g. ">= 1", "> 0 and < 1"; empty without one."""
        low = "" if self.least is None else f"{'>' if self.open[0] else '>='} {self.least:g}"
        high = "" if self.greatest is None else f"{'<' if self.open[1] else '<='} {self.greatest:g}"
        return " and ".join(part for part in (low, high) if part)


_WORDS = {
    "int": "whole number",
    "float": "number",
    "bool": "true or false",
    "str": "string",
    "pattern": "N:M",
}


@dataclass(frozen=True, slots=True)
class Parameter:
    """One argument: what it takes, in which unit, within which limits."""

    name: str
    forms: tuple[Form, ...]
    description: str = ""
    required: bool = False
    default: Any = None

    @property
    def type(self) -> str:
        return " | ".join(str(form) for form in self.forms)

    @property
    def unit(self) -> str | None:
        return " | ".join(form.unit for form in self.forms if form.unit) or None

    @property
    def range(self) -> str | None:
        return " | ".join(form.limits for form in self.forms if form.limits) or None

    @property
    def slot(self) -> str | None:
        return next((form.slot for form in self.forms if form.slot), None)

    def takes(self, type_: str) -> bool:
        """Whether the argument may be of this type, or a list of it where it may be data or a model."""
        inner = [item.type for form in self.forms for item in form.item if item.type in ("data", "model")]
        return type_ in (*(form.type for form in self.forms), *inner)


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing a recipe can call."""

    kind: str
    role: EntryRole
    summary: str
    family: str = ""
    slot: str | None = None
    doc: str = ""
    paper: str = "folklore"
    contract: str = ""
    """Fidelity of a method: EXACT, WITHIN(x), LOSSY, HEALED, TRAIN; `EXACT when a = b, else HEALED`."""
    needs: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()
    breaks: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    examples: tuple[str, ...] = ()
    value: str = "model"
    """Kind of the result: "model", "data", "report", "part", "export", "number"."""
    models: tuple[int, int | None] = (0, 0)
    """Fewest and most positional models; None: no upper limit, and they are written as a list."""
    overrides: tuple[str, ...] = ()
    """Arguments that a rule may set for the modules it names."""
    closure: str = ""
    """Hash of the sources it depends on inside effc and its own package."""
    package: str = ""
    """The package it comes from; empty for effc's own."""
    judges: bool = False
    """Whether its class has rules of its own over several arguments: only making it tells if they fit."""

    @property
    def short(self) -> str:
        """The last word of a part's kind, which recipes write: `train.optimizer.adamw` is `adamw`."""
        return self.kind.rpartition(".")[2]

    def parameter(self, name: str) -> Parameter | None:
        return next((p for p in self.parameters if p.name == name), None)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, known: Mapping[str, Any]) -> Self:
        """Raises TypeError or KeyError when the fields are those of another version."""
        parameters = tuple(_parameter(p) for p in known["parameters"])
        rest = {key: _tuples(value) for key, value in known.items() if key != "parameters"}
        return cls(parameters=parameters, **rest)


@dataclass(frozen=True)
class Catalogue:
    """All entries by name."""

    entries: tuple[Entry, ...]
    broken: Mapping[str, str] = field(default_factory=dict)
    """Names of files that cannot be used -> why."""

    @classmethod
    def of(cls, entries: Iterable[Entry], broken: Mapping[str, str] | None = None) -> Self:
        return cls(tuple(sorted(entries, key=lambda e: e.kind)), dict(broken or {}))

    @cached_property
    def _by_kind(self) -> dict[str, Entry]:
        return {entry.kind: entry for entry in self.entries}

    def find(self, kind: str) -> Entry | None:
        """The entry of this full name, e.g. "quantize.gptq" or "train.optimizer.adamw"."""
        return self._by_kind.get(kind)

    def part(self, slot: str, name: str) -> Entry | None:
        """The part of a slot, by short or full name."""
        return next((e for e in self.of_slot(slot) if name in (e.short, e.kind)), None)

    def of_slot(self, slot: str) -> list[Entry]:
        return [e for e in self.entries if e.role == "part" and e.slot == slot]

    def of_role(self, role: EntryRole) -> list[Entry]:
        return [e for e in self.entries if e.role == role]

    def near(self, kind: str, role: EntryRole | None = None) -> list[str]:
        """Names that look like this one, best first; also the same method in another family."""
        names = [e.kind for e in self.entries if role in (None, e.role)]
        last = kind.rpartition(".")[2]
        same = [name for name in names if name.rpartition(".")[2] == last]
        alike = get_close_matches(kind, names, n=1, cutoff=0.85)
        if same or alike:
            return same[:3] or alike
        by_last = {name.rpartition(".")[2]: name for name in names}
        like = [by_last[name] for name in get_close_matches(last, by_last, n=2, cutoff=0.75)]
        return list(dict.fromkeys([*get_close_matches(kind, names, n=3, cutoff=0.65), *like]))[:3]


def _parameter(known: Mapping[str, Any]) -> Parameter:
    forms = tuple(_form(form) for form in known["forms"])
    return Parameter(**{**{k: _tuples(v) for k, v in known.items()}, "forms": forms})


def _form(known: Mapping[str, Any]) -> Form:
    item = tuple(_form(form) for form in known["item"])
    return Form(**{**{k: _tuples(v) for k, v in known.items()}, "item": item})


def _tuples(value: Any) -> Any:
    """JSON has only lists; entries have only tuples."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
