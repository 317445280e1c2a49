"""The selector report: which modules a method touches, with which arguments, in a few rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from effc.compiler.method import Method
from effc.compiler.model import Model
from effc.compiler.selects import Selects
from effc.specs.units import Gradient


def selector_report(method: Method, model: Model) -> list[tuple[str, str, str]]:
    """Which modules the method touches: (roles, layers, arguments), modules of one fate in one row."""
    if not isinstance(method, Selects):
        return []
    names = {name.path: name for name in model.names()}
    layers: dict[tuple[str, str], list[int | None]] = {}
    count = model.layers
    for path, applied in method.targets(model).items():
        layer = names[path].layer
        words = ", ".join(
            f"{key} = {_shown(getattr(method, key), getattr(applied, key), layer, count)}"
            for key in type(method).overrides
        )
        layers.setdefault((words, names[path].role), []).append(names[path].layer)
    rows: dict[tuple[str, str], list[str]] = {}
    for (words, role), numbers in layers.items():
        rows.setdefault((_ranges(numbers), words), []).append(role)
    return [(_together(roles), where, words) for (where, words), roles in rows.items()]


def _shown(written: Any, applied: Any, layer: int | None, layers: int) -> str:
    """The argument as it applies; a gradient by its ends, so that its layers share a row."""
    if isinstance(written, Gradient) and applied == written.at(layer, layers):
        return f"{written.first} to {written.last}"
    return str(applied)


def _together(roles: Sequence[str]) -> str:
    """attention.q, attention.k, mlp.up -> `attention.{q,k} mlp.up`"""
    families: dict[str, list[str]] = {}
    for role in roles:
        family, _, last = role.rpartition(".")
        families.setdefault(family, []).append(last)
    return " ".join(
        f"{family}.{{{','.join(last)}}}"
        if len(last) > 1 and family
        else ".".join(filter(None, (family, last[0])))
        for family, last in families.items()
    )


def _ranges(layers: Sequence[int | None]) -> str:
    """[0, 1, 2, 5] -> `layers 0-2, 5`; nothing for modules outside the layers."""
    numbers = sorted({n for n in layers if n is not None})
    if not numbers:
        return ""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return "layers " + ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
