"""What an op is: its type, the table of all ops, and how a definition enters it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Kind:
    """The type of an op: which values it takes, how many it gives, which attributes it has."""

    name: str
    takes: tuple[str, ...]
    optional: int
    """How many of the last values may be absent."""
    gives: int
    attributes: frozenset[str]
    run: Callable[..., Any]


OPS: dict[str, Kind] = {}
"""Every op by name; `effc.compiler.ops` fills it."""


def op(gives: int = 1) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function: positional arguments are values (those with None may be absent), keywords
    attributes.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        parameters = inspect.signature(function).parameters.values()
        values = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        words = frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        optional = sum(p.default is None for p in values)
        name = function.__name__
        known = OPS.get(name)
        if known is not None and known.run.__module__ != function.__module__:
            raise TypeError(
                f"the op {name!r} of {function.__module__} is one of {known.run.__module__} already"
            )
        OPS[name] = Kind(name, tuple(p.name for p in values), optional, gives, words, function)
        return function

    return register
