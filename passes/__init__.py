"""Floor 4: the methods. `passes/prune/wanda.py` is `prune.wanda`; listing the folder lists the methods."""

from __future__ import annotations

import importlib
import pkgutil
from difflib import get_close_matches
from functools import cache

from effc.compiler.method import Method


def kinds() -> list[str]:
    """Every method's name, read from file names; imports none of them."""
    return sorted(
        f"{family.name}.{method.name}"
        for family in pkgutil.iter_modules(__path__)
        if family.ispkg and family.name != "lower"  # no stage of a recipe: it chooses kernels
        for method in pkgutil.iter_modules([f"{path}/{family.name}" for path in __path__])
        if not method.name.startswith("_")
    )


@cache
def resolve(kind: str) -> type[Method]:
    """Import one method by its name.

    Raises:
        KeyError: (kind, near names) when there is no such file.
        TypeError: when the file does not define exactly one method.
    """
    if kind not in (known := kinds()):
        raise KeyError(kind, get_close_matches(kind, known))
    module = importlib.import_module(f"{__name__}.{kind}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        names = ", ".join(cls.__name__ for cls in found) or "none"
        raise TypeError(f"{module.__file__} must define exactly one Method, found {names}")
    return found[0]
