"""Extract: the cheapest terms of some classes of an e-graph, where what they share is paid once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from effc.compiler.egraph import EGraph, Node, Term

Price = Callable[[Node, Any, Sequence[Any]], float]
"""What a node costs itself: the node, what is known of its class, what is known of its arguments."""

TRIED = 200
"""Classes at most of which it is tried whether sharing them pays."""


def extract(graph: EGraph, roots: Sequence[int], price: Price) -> tuple[list[Term], float]:
    """A term for each root, and what all cost together.

    The cheapest tree of each class comes from the bottom up. The best set of shared terms is hard to find, so
    classes that several nodes read are then tried in turn: what such a class costs is paid, all that reads it
    has it for nothing, and it is kept where the total falls. Of equal prices the node that came first wins.
    """
    roots = [graph.find(r) for r in roots]
    chosen = _trees(graph, price, {})
    best = [chosen[r] for r in roots]
    total = paid(graph, best, price)
    held: dict[int, Choice] = {}
    for number in _read_by_several(graph)[:TRIED]:
        if number in held or number not in chosen:
            continue
        fixed = held | _used(chosen[number])
        found = _trees(graph, price, fixed)
        trial = [found[r] for r in roots]
        if (cost := paid(graph, trial, price)) < total * (1 - 1e-12):
            best, total, held = trial, cost, fixed
    return [_term(choice) for choice in best], total


def _read_by_several(graph: EGraph) -> list[int]:
    """Classes that stand in more than one node, those that came last first: they are made of the others."""
    count: dict[int, int] = {}
    for number in graph.classes:
        for node in graph.nodes(number):
            for arg in {graph.find(a) for a in node.args}:
                count[arg] = count.get(arg, 0) + 1
    return sorted((n for n, uses in count.items() if uses > 1), reverse=True)


Choice = tuple[int, Node, tuple["Choice", ...]]
"""A class, the node taken for it, and the choices for its arguments."""


def _trees(graph: EGraph, price: Price, fixed: dict[int, Choice]) -> dict[int, Choice]:
    """The cheapest tree of every class; what is in `fixed` is taken from there and costs nothing."""
    cost: dict[int, float] = dict.fromkeys(fixed, 0.0)
    node_of: dict[int, Node] = {}
    changed = True
    while changed:
        changed = False
        for number in graph.classes:
            if number in fixed:
                continue
            for node in graph.nodes(number):
                args = [graph.find(a) for a in node.args]
                if any(a not in cost for a in args):
                    continue
                own = price(node, graph.known[number], [graph.known[a] for a in args])
                whole = own + sum(cost[a] for a in args)
                if number not in cost or whole < cost[number] * (1 - 1e-12):
                    cost[number], node_of[number] = whole, node
                    changed = True
    made = dict(fixed)
    return {n: _choice(graph, n, node_of, made) for n in graph.classes if n in cost}


def _choice(graph: EGraph, number: int, node_of: dict[int, Node], made: dict[int, Choice]) -> Choice:
    if number not in made:
        node = node_of[number]
        made[number] = (number, node, tuple(_choice(graph, graph.find(a), node_of, made) for a in node.args))
    return made[number]


def _used(choice: Choice) -> dict[int, Choice]:
    """Class -> choice, for everything in a term."""
    found: dict[int, Choice] = {}
    todo = [choice]
    while todo:
        one = todo.pop()
        if one[0] not in found:
            found[one[0]] = one
            todo += one[2]
    return found


def paid(graph: EGraph, choices: Sequence[Choice], price: Price) -> float:
    """What terms cost together: each class once."""
    found: dict[int, Choice] = {}
    for choice in choices:
        found = _used(choice) | found
    return sum(
        price(node, graph.known[number], [graph.known[graph.find(a)] for a in node.args])
        for number, node, _ in found.values()
    )


def _term(choice: Choice) -> Term:
    made: dict[int, Term] = {}

    def build(one: Choice) -> Term:
        if one[0] not in made:
            made[one[0]] = Term(one[1].op, tuple(build(a) for a in one[2]), one[1].data)
        return made[one[0]]

    return build(choice)
