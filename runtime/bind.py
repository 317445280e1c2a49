"""From a recipe's calls to the objects they mean: methods, parts and what a stage takes."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

from pydantic import ValidationError

from effc import passes
from effc.compiler.method import Method, Part, Slot
from effc.compiler.plan import Staged
from effc.specs.diagnostic import Diagnostic, EffcError, Label
from effc.specs.recipe import Binding, Call, Recipe, Ref, Value

T = TypeVar("T", Method, Part)

_PARTS = "effc.runtime.parts"


def method_of(call: Call) -> Method:
    """The method of a stage with its arguments; slots that nothing fills get their default part.

    Raises:
        EffcError: E202 when the method refuses an argument that the catalogue let through.
    """
    return _made(passes.resolve(call.kind), call)


def part_of(call: Call) -> Part:
    """The part that a nested call means, e.g. `adamw(lr = 3e-4)`."""
    return _made(part_class(call.kind), call)


@cache
def part_class(kind: str) -> type[Part]:
    """Import one part by its full name, `train.optimizer.adamw`.

    Raises:
        TypeError: when the file does not define exactly one part.
    """
    module = importlib.import_module(f"{_PARTS}.{kind}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Part) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise TypeError(f"{module.__file__} must define exactly one Part, found {len(found)}")
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


def _made(cls: type[T], call: Call) -> T:
    given = {key: _value(value) for key, value in call.arguments.items()}
    filled = {**_defaults(cls), **{key: value for key, value in given.items() if value is not None}}
    try:
        return cls.model_validate(filled)
    except ValidationError as error:
        raise EffcError(
            *(_refused(call, dict(problem)) for problem in error.errors(include_url=False))
        ) from error


def _defaults(cls: type[Method] | type[Part]) -> dict[str, Any]:
    """Default parts of the slots."""
    return {
        name: part_class(f"{slot.folder}.{slot.default}")()
        for name, info in cls.model_fields.items()
        for slot in info.metadata
        if isinstance(slot, Slot) and slot.default is not None
    }


def _value(value: Value) -> Any:
    match value:
        case Call() if "." in value.kind:
            return part_of(value)
        case tuple():
            return tuple(_value(item) for item in value)
        case Mapping():
            return {key: _value(item) for key, item in value.items()}
    return value


def _refused(call: Call, problem: Mapping[str, Any]) -> Diagnostic:
    key = str(problem["loc"][0]) if problem["loc"] else ""
    span = call.spans.get(key, call.span)
    title = (
        f"`{key}` of `{call.kind}` cannot be this" if key else f"`{call.kind}` cannot take these arguments"
    )
    words = str(problem["msg"]).removeprefix("Value error, ")
    return Diagnostic("E202", title, (Label(span, words),) if span else (), () if span else (words,))
