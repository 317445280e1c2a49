"""Patterns over the block graph: `norm -> linear` finds blocks that feed each other."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from torch import fx

from effc.specs.diagnostic import Diagnostic, EffcError

if TYPE_CHECKING:
    from effc.compiler.model import Model

_STEP = re.compile(r"^\s*(?:(?P<name>[A-Za-z_]\w*)\s*:\s*)?(?P<what>\*|[A-Za-z_][\w.]*)\s*$")


@dataclass(frozen=True, slots=True)
class Element:
    """One block of a chain: a role (`attention.q`), a type (`linear`, `MLP`), `add`, or `*` for any."""

    capture: str
    what: str


@dataclass(frozen=True, slots=True)
class Pattern:
    """A chain of blocks, each reading the one before."""

    text: str
    chain: tuple[Element, ...]


@dataclass(frozen=True, slots=True)
class Hit:
    """Where a pattern holds: captured paths by name; an `add` is captured by its node's name."""

    paths: dict[str, str]

    def __getitem__(self, name: str) -> str:
        return self.paths[name]


def pattern(text: str) -> Pattern:
    """Parse `n: norm -> linear`. A capture name stands before a colon; without one, the word itself is it
    (a word that comes again gets a number: linear, linear2).

    Raises:
        EffcError: E404 when an element is not a word.
    """
    chain: list[Element] = []
    used: set[str] = set()
    for part in text.split("->"):
        found = _STEP.match(part)
        if found is None:
            help = "write roles or types with arrows between, such as norm -> linear"
            raise EffcError(Diagnostic("E404", f"`{part.strip()}` is no element of a pattern", help=help))
        capture = found["name"] or found["what"].replace("*", "any")
        fresh, n = capture, 2
        while fresh in used:
            fresh, n = f"{capture}{n}", n + 1
        used.add(fresh)
        chain.append(Element(fresh, found["what"]))
    return Pattern(text, tuple(chain))


def find(model: Model, wanted: Pattern) -> list[Hit]:
    """All places where the chain holds, in graph order. A node may be part of several hits."""
    hits: list[Hit] = []

    def grow(node: fx.Node, rest: tuple[Element, ...], paths: dict[str, str]) -> None:
        element, *more = rest
        if not _is(model, node, element.what):
            return
        paths = paths | {element.capture: _label(node)}
        if not more:
            hits.append(Hit(paths))
            return
        for user in node.users:
            grow(user, tuple(more), paths)

    for node in list(model.gm.graph.nodes):
        grow(cast(fx.Node, node), wanted.chain, {})
    return hits


def _label(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _is(model: Model, node: fx.Node, what: str) -> bool:
    if node.op == "call_function":
        return what in ("*", getattr(node.target, "__name__", ""))
    if node.op != "call_module":
        return False
    path = str(node.target)
    role = model.roles.get(path)
    if what == "*" or (role is not None and role.within(what)):
        return True
    module = model.module(path)
    return any(kind.__name__.lower() == what.lower() for kind in type(module).__mro__[:-2])
