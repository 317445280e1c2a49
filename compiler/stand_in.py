"""Stand-ins: after a stage that was refused, selectors of later stages are still held against its names."""

from __future__ import annotations

from collections.abc import Sequence

from effc.compiler.method import Method
from effc.compiler.model import Model
from effc.compiler.selects import Selects
from effc.compiler.shapes import Train
from effc.specs.diagnostic import Diagnostic, EffcError


def stands_in(method: Method, model: Model) -> Model | None:
    """A model with the names that the stage's result would have; None where it may have other layers."""
    return model if isinstance(method, Selects | Train) else None


def selector_problems(method: Method, model: Model) -> Sequence[Diagnostic]:
    """What is wrong with the selectors of a method on a model of these names."""
    if not isinstance(method, Selects):
        return ()
    try:
        method.targets(model)
    except EffcError as problem:
        return problem.diagnostics
    return ()
