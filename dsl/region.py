"""Regions: the part of a model that a stage touches, and whether two of them share a module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from effc.specs.facts import Claim
from effc.specs.recipe import Call
from effc.specs.selector import Name, Selector, SelectorError

_DEFAULT = ("attention", "mlp", "moe.experts", "moe.shared", "linear")
_SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 80)
"""Numbers of layers on which overlaps are tried while the model is unknown."""


@dataclass(frozen=True, slots=True)
class Region:
    """Part of a model: all of it, or what `select`, `except` and `rules` of a stage take in."""

    select: tuple[str, ...] | None = None
    except_: tuple[str, ...] = ()
    rules: tuple[tuple[str, bool], ...] = ()


def overlap(a: Region, b: Region) -> bool | None:
    """Whether two regions share a module: certainly, certainly not, or None where it depends on the model."""
    if a.select is None or b.select is None or a == b:
        return True
    found = {bool(_modules(a, n) & _modules(b, n)) for n in _SIZES}
    return found.pop() if len(found) == 1 else None


@cache
def _modules(region: Region, layers: int) -> frozenset[str]:
    """The region in a decoder of so many layers."""
    names = _decoder(layers)
    try:
        taken = {p for text in region.select or _DEFAULT for p in Selector.parse(text).match(names)}
        taken -= {p for text in region.except_ for p in Selector.parse(text).match(names)}
        for text, skip in region.rules:
            paths = set(Selector.parse(text).match(names))
            taken = taken - paths if skip else taken | paths
    except SelectorError:
        return frozenset()
    return frozenset(taken)


@cache
def _decoder(layers: int) -> tuple[Name, ...]:
    inner = (
        "attention.q",
        "attention.k",
        "attention.v",
        "attention.o",
        "mlp.gate",
        "mlp.up",
        "mlp.down",
        "moe.router",
        "moe.experts.gate",
        "moe.experts.up",
        "moe.experts.down",
        "moe.shared.gate",
        "moe.shared.up",
        "moe.shared.down",
    )
    deep = [Name(f"layers.{i}.{role}", role, i) for i in range(layers) for role in inner]
    return (Name("embedding", "embedding"), *deep, Name("head", "head"))


def region_of(c: Claim, call: Call) -> Region:
    if c.region == "select":
        return selected(call)
    return Region() if c.region == "model" else Region((c.region,))


def selected(call: Call) -> Region:
    rules = call.arguments.get("rules") or ()
    assert isinstance(rules, tuple)
    return Region(
        _texts(call.arguments.get("select")) or _DEFAULT,
        _texts(call.arguments.get("except")),
        tuple((str(r["on"]), bool(r.get("skip"))) for r in rules if isinstance(r, Mapping)),
    )


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(str(v) for v in value) if isinstance(value, tuple) else ()
