"""The vocabulary of facts, read from facts.yaml, and what contracts say in it, as values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml


@dataclass(frozen=True, slots=True)
class FactKind:
    """One line of facts.yaml."""

    name: str
    says: str
    loaded: bool | Literal["unknown"] = False
    excludes: tuple[str, ...] = ()
    implies: tuple[str, ...] = ()
    of: str = "structure"
    cure: str | None = None


@dataclass(frozen=True, slots=True)
class ExportRule:
    """What a format cannot hold, or must have; `unless` names the argument that lifts it."""

    needs: tuple[str, ...] = ()
    refuses: tuple[str, ...] = ()
    unless: str | None = None
    instead: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Claim:
    """One fact of a contract: `sparse_2_4(select) when pattern = 2:4`."""

    fact: str
    region: str
    when: tuple[tuple[str, str], ...] = ()

    def applies(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the arguments meet the condition, words and numbers compared as written."""
        return all(_word(arguments.get(name)) == value for name, value in self.when)


_CLAIM = re.compile(r"(?P<fact>\w+)\((?P<region>[^()]*)\)(?: when (?P<when>.+))?\Z")


@cache
def claim(text: str) -> Claim:
    """Raises ValueError when the text is no claim or names no fact."""
    found = _CLAIM.match(text)
    if not found or found["fact"] not in facts():
        raise ValueError(f"`{text}` is no fact of specs/facts.yaml")
    pairs = [part.split(" = ") for part in (found["when"] or "").split(" and ") if part]
    return Claim(found["fact"], found["region"], tuple((name, value) for name, value in pairs))


@cache
def facts() -> Mapping[str, FactKind]:
    return {name: FactKind(name, **_tuples(line)) for name, line in _file()["facts"].items()}


@cache
def export_rules() -> Mapping[str, ExportRule]:
    return {name: ExportRule(**_tuples(line)) for name, line in _file()["exports"].items()}


@cache
def _file() -> Mapping[str, Any]:
    text = files("effc.specs").joinpath("facts.yaml").read_text(encoding="utf-8")
    loaded: Mapping[str, Any] = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return loaded


def _tuples(line: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in line.items()}


def promised(fidelity: str, arguments: Mapping[str, Any]) -> str:
    """What a contract's fidelity, e.g. `EXACT when renorm = true, else HEALED`, is with these arguments."""
    word, _, rest = fidelity.partition(" when ")
    if not rest:
        return word
    condition, _, otherwise = rest.partition(", else ")
    pairs = [part.split(" = ") for part in condition.split(" and ")]
    met = all(_equal(arguments.get(name), value) for name, value in pairs)
    return word if met else promised(otherwise, arguments)


def _equal(value: Any, written: str) -> bool:
    """Whether a value is the one written; 1 is a number and 1.0 a share, 0 is both."""
    if isinstance(value, int | float) and not isinstance(value, bool) and written[:1].isdigit():
        alike = isinstance(value, float) == ("." in written) or value == 0
        return alike and float(written) == value
    return _word(value) == written


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)
