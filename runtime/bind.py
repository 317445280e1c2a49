"""From a recipe's calls to the objects they mean: methods, parts, data sources, loads, exports."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache
from typing import Any, cast

from pydantic import ValidationError

from effc import passes
from effc.compiler.method import Method, Part, Slot
from effc.compiler.plan import Staged
from effc.runtime.refusal import refusals
from effc.specs.base import Spec
from effc.specs.diagnostic import EffcError
from effc.specs.recipe import Binding, Call, Recipe, Ref, Value
from effc.specs.units import Gradient

HOMES = {"data": "effc.runtime.data", "model": "effc.runtime.models", "export": "effc.runtime.exports"}
"""Role of a call -> the package that holds one file for each kind."""

_PARTS = "effc.runtime.parts"


def method_of(call: Call) -> Method:
    """The method of a stage with its arguments; slots that nothing fills get their default part.

    Raises:
        EffcError: E202 when the class refuses an argument that the catalogue let through.
    """
    return cast(Method, made(passes.resolve(call.kind), call))


def part_of(call: Call) -> Part:
    """The part that a nested call means, e.g. `adamw(lr = 3e-4)`."""
    return cast(Part, made(spec_class(f"{_PARTS}.{call.kind}"), call))


def spec_of(role: str, call: Call) -> Any:
    """The data source, load or export that a call means. `role` is a key of HOMES."""
    return made(spec_class(f"{HOMES[role]}.{call.kind}"), call)


def class_of(role: str, kind: str) -> type[Spec]:
    """The class of a call: a method, a part, or one of the HOMES."""
    if role == "method":
        return passes.resolve(kind)
    return spec_class(f"{_PARTS}.{kind}" if role == "part" else f"{HOMES[role]}.{kind}")


@cache
def spec_class(module: str) -> type[Spec]:
    """The one class that a plug-in's file defines.

    Raises:
        TypeError: when the file does not define exactly one.
    """
    found = [
        value
        for value in vars(importlib.import_module(module)).values()
        if isinstance(value, type) and issubclass(value, Spec) and value.__module__ == module
    ]
    if len(found) != 1:
        raise TypeError(f"{module} must define exactly one Spec, found {len(found)}")
    return found[0]


def staged(binding: Binding, recipe: Recipe, seq: int = 0) -> Staged:
    """A stage with the models it takes; `seq` is the length of its data's sequences."""
    models = {b.name for b in recipe.bindings if b.value == "model"}
    named = {
        key: value.name
        for key, value in binding.call.arguments.items()
        if isinstance(value, Ref) and value.name in models
    }
    return Staged(method_of(binding.call), tuple(r.name for r in binding.call.models), named, seq)


def made(cls: type[Spec], call: Call) -> Spec:
    """The call as an object of the class, slots filled. Raises EffcError with all that the class refuses."""
    try:
        return cls.model_validate(filled(cls, call))
    except ValidationError as error:
        raise EffcError(*refusals(call, map(dict, error.errors(include_url=False)))) from error


def filled(cls: type[Spec], call: Call) -> dict[str, Any]:
    """The arguments of a call as objects, slots filled. Raises EffcError with what a nested part refuses."""
    given = {key: _value(value) for key, value in call.arguments.items()}
    return {**_defaults(cls), **{key: value for key, value in given.items() if value is not None}}


def _defaults(cls: type[Spec]) -> dict[str, Any]:
    """Default parts of the slots."""
    return {
        name: spec_class(f"{_PARTS}.{slot.folder}.{slot.default}")()
        for name, info in cls.model_fields.items()
        for slot in info.metadata
        if isinstance(slot, Slot) and slot.default is not None
    }


def _value(value: Value) -> Any:
    match value:
        case Call(kind="depth", arguments=ends):
            return Gradient(*(float(cast(float, ends[end])) for end in ("first", "last")))
        case Call() if "." in value.kind:
            return part_of(value)
        case tuple():
            return tuple(_value(item) for item in value)
        case Mapping():
            return {key: _value(item) for key, item in value.items()}
    return value
