"""Floor 4: the methods. `passes/prune/wanda.py` is `prune.wanda`; listing the folder lists the methods."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache

from effc.compiler.method import Method
from effc.specs import plugins
from effc.specs.diagnostic import Diagnostic, EffcError


def kinds() -> list[str]:
    """Every method's name, read from file names, those of other packages included; imports none of them."""
    return sorted({*own(), *(one.kind for one in plugins.methods())} - set(clashes()))


def own() -> list[str]:
    """The names of the methods that come with effc."""
    return sorted(
        f"{family.name}.{method.name}"
        for family in pkgutil.iter_modules(__path__)
        if family.ispkg and family.name != "lower"  # no stage of a recipe: it chooses kernels
        for method in pkgutil.iter_modules([f"{path}/{family.name}" for path in __path__])
        if not method.name.startswith("_")
    )


def clashes() -> Mapping[str, str]:
    """Names that two packages give, with who gives them; none of them is taken."""
    givers: dict[str, list[str]] = {kind: ["effc"] for kind in own()}
    for one in plugins.methods():
        givers.setdefault(one.kind, []).append(str(one.package))
    return {kind: " and ".join(names) for kind, names in givers.items() if len(names) > 1}


def module_of(kind: str) -> str:
    """The dotted name of the file that holds a method."""
    foreign = (one.module for one in plugins.methods() if one.kind == kind)
    return next(foreign, f"{__name__}.{kind}")


@cache
def resolve(kind: str) -> type[Method]:
    """Import one method by its name.

    Raises:
        KeyError: (kind, near names) when there is no such file.
        EffcError: E235 when two packages give the name, or the file of another package does not import.
        TypeError: when the file does not define exactly one method.
    """
    if who := clashes().get(kind):
        raise EffcError(unusable(kind, f"{who} both give it"))
    if kind not in (known := kinds()):
        raise KeyError(kind, get_close_matches(kind, known))
    try:
        module = importlib.import_module(module_of(kind))
    except Exception as problem:
        package = plugins.package_of(module_of(kind))
        if package is None:
            raise
        said = f"{package} does not import: {type(problem).__name__}: {problem}"
        raise EffcError(unusable(kind, said)) from problem
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        names = ", ".join(cls.__name__ for cls in found) or "none"
        raise TypeError(f"{module.__file__} must define exactly one Method, found {names}")
    return found[0]


def unusable(kind: str, why: str) -> Diagnostic:
    """A method that is installed and cannot be used."""
    return Diagnostic(
        "E235",
        f"`{kind}` cannot be used",
        notes=(why,),
        help="remove or repair the package; `effc methods` lists what is broken",
    )
