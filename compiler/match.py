"""Match: find the places of a model where a pattern holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING

from effc.compiler.blocks.unit import REGISTRY, arguments
from effc.compiler.ops import OPS
from effc.compiler.pattern import Element, Pattern
from effc.compiler.view import GENERAL, Vertex, view
from effc.specs.diagnostic import Diagnostic, EffcError

if TYPE_CHECKING:
    from effc.compiler.model import Model

MOST = 100_000
"""Partial matches that one search may try."""


@dataclass(frozen=True, slots=True)
class Hit:
    """Where a pattern holds: captures by name.

    `hit["linear"]` is the path of a block. Of an op it is the path of the unit whose weights the op uses
    (`layers.0.attention.q`), or `block/op.number` where it uses none. A function such as `add` is captured by
    the name of its node.
    """

    paths: dict[str, str]
    blocks: dict[str, str] = field(default_factory=dict)
    """The same by the node of the block graph that holds each."""

    def __getitem__(self, name: str) -> str:
        return self.paths[name]

    def __str__(self) -> str:
        return ", ".join(f"{name} = {path}" for name, path in self.paths.items())


def find(model: Model, wanted: Pattern) -> list[Hit]:
    """All places where the pattern holds, in graph order. A node may be part of several hits; of hits on the
    very same nodes (`norm -> {linear, linear}`) the first is taken.

    Raises:
        EffcError: E408 when a condition asks for a field that no node of its kind has, or when there are more
            places than can be looked through.
    """
    vertices = view(model, wanted.over)
    _fields_exist(vertices, wanted)
    order = {id(vertex): place for place, vertex in enumerate(vertices)}
    seen: set[frozenset[int]] = set()
    hits: list[Hit] = []
    for found in _search(vertices, wanted, order):
        same = frozenset(id(vertex) for vertex in found)
        if same in seen:
            continue
        seen.add(same)
        named = list(zip((e.capture for e in wanted.elements), found, strict=True))
        hit = Hit({name: v.label for name, v in named}, {name: _block(v) for name, v in named})
        if wanted.where is None or wanted.where(model, hit):
            hits.append(hit)
    return hits


def _search(
    vertices: Sequence[Vertex], wanted: Pattern, order: dict[int, int]
) -> Iterator[tuple[Vertex, ...]]:
    """Assignments of nodes to elements, depth first; each step starts from neighbors of what is assigned."""
    plan = _plan(wanted)
    tried = 0

    def grow(depth: int, taken: dict[int, Vertex]) -> Iterator[tuple[Vertex, ...]]:
        nonlocal tried
        if depth == len(plan):
            yield tuple(taken[i] for i in range(len(plan)))
            return
        number, before, after = plan[depth]
        for vertex in _candidates(vertices, taken, before, after, order):
            tried += 1
            if tried > MOST:
                help = "say more about its elements, or look for a smaller piece"
                title = f"`{wanted.text}` fits more than {MOST} ways in this model"
                raise EffcError(Diagnostic("E408", title, help=help))
            if vertex in taken.values() or not _fits(vertex, wanted.elements[number]):
                continue
            if all(taken[a] in vertex.reads for a in before) and all(vertex in taken[b].reads for b in after):
                yield from grow(depth + 1, taken | {number: vertex})

    return grow(0, {})


def _plan(wanted: Pattern) -> list[tuple[int, list[int], list[int]]]:
    """Elements in the order they are looked for, each with those found before it that it reads or feeds."""
    done: list[tuple[int, list[int], list[int]]] = []
    known: list[int] = []
    while len(known) < len(wanted.elements):
        for number in range(len(wanted.elements)):
            before = [a for a, b in wanted.edges if b == number and a in known]
            after = [b for a, b in wanted.edges if a == number and b in known]
            if number not in known and (before or after or not known):
                done.append((number, before, after))
                known.append(number)
                break
    return done


def _candidates(
    vertices: Sequence[Vertex],
    taken: dict[int, Vertex],
    before: Sequence[int],
    after: Sequence[int],
    order: dict[int, int],
) -> Sequence[Vertex]:
    if before:
        return taken[before[0]].users
    if after:
        return sorted(taken[after[0]].reads, key=lambda vertex: order[id(vertex)])
    return vertices


def _fits(vertex: Vertex, element: Element) -> bool:
    if not any(vertex.is_a(word) for word in element.words):
        return False
    return all(
        (found := vertex.ask(condition.field)) is not None and condition.met(found[0])
        for condition in element.conditions
    )


def _block(vertex: Vertex) -> str:
    return str(vertex.node.target) if vertex.node.op == "call_module" else vertex.node.name


def _fields_exist(vertices: Sequence[Vertex], wanted: Pattern) -> None:
    """Refuse a field that is known nowhere: it would never match, without a word."""
    known = _known()
    for element in wanted.elements:
        for condition in element.conditions:
            name = condition.field
            if name in known or any(vertex.ask(name) for vertex in vertices):
                continue
            near = get_close_matches(name, known, n=1) or ["users"]
            raise EffcError(
                Diagnostic(
                    "E408",
                    f"nothing in this model has a field `{name}`",
                    notes=(f"`{wanted.text}` asks for it at `{element.capture}`",),
                    help=f"did you mean `{near[0]}`? All nodes have {', '.join(GENERAL)}",
                )
            )


def _known() -> set[str]:
    """Fields that some block or op has, whether or not this model has any."""
    found: set[str] = set(GENERAL)
    for kind in OPS.values():
        found |= kind.attributes
    for unit in REGISTRY.values():
        found |= arguments(unit).keys()
    return found
