"""Linear algebra as terms of an e-graph: known matrices, values that come in, and what makes terms equal.

    matrix(name)  diag(name)  product(A, B)  sum(A, B)  times(s, A)  rows(A, B)    known before a run
    value(name)   vector(name)                                                     what comes in; constants
    apply(A, v)   add(u, v)   scale(s, v)   take((start, count), v)                computed in a run

Shapes: a matrix A [o, i] takes v [..., i] to [..., o]; a diagonal is [n, n] and stored as n numbers; `rows`
puts B below A; `take` cuts a run of channels out of v.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from effc.compiler.egraph import EGraph, Node, Pattern, Rule, Shape, Term, Var
from effc.compiler.extract import Price


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a class of matrices or values."""

    kind: Literal["matrix", "value"]
    rows: int
    """Rows of a matrix, channels of a value."""
    columns: int = 0
    diagonal: bool = False
    constant: bool = True
    """Whether it does not depend on what comes in."""


Sizes = Mapping[tuple[str, str], tuple[int, ...]]
"""(op, name) of a leaf -> [o, i] of a matrix, [n] of a diagonal, a vector or a value."""


def known_by(sizes: Sizes) -> Callable[[Node, Sequence[Known]], Known]:
    """What is known of a node, by the sizes of leaves.

    The function raises ValueError where shapes do not fit.
    """

    def known(node: Node, args: Sequence[Known]) -> Known:
        match node.op:
            case "matrix":
                rows, columns = sizes["matrix", str(node.data)]
                return Known("matrix", rows, columns)
            case "diag":
                (n,) = sizes["diag", str(node.data)]
                return Known("matrix", n, n, diagonal=True)
            case "vector" | "value":
                (n,) = sizes[node.op, str(node.data)]
                return Known("value", n, constant=node.op == "vector")
        return _made(node, args)

    return known


def _made(node: Node, args: Sequence[Known]) -> Known:
    first, second = args[0], args[-1]
    whole = all(a.diagonal for a in args)
    match node.op:
        case "product" if first.columns == second.rows:
            return Known("matrix", first.rows, second.columns, whole)
        case "sum" if (first.rows, first.columns) == (second.rows, second.columns):
            return Known("matrix", first.rows, first.columns, whole)
        case "times":
            return first
        case "rows" if first.columns == second.columns:
            return Known("matrix", first.rows + second.rows, first.columns)
        case "apply" if first.columns == second.rows:
            return Known("value", first.rows, constant=second.constant)
        case "add" if first.rows == second.rows:
            return Known("value", first.rows, constant=first.constant and second.constant)
        case "scale":
            return first
        case "take" if isinstance(node.data, tuple) and node.data[0] + node.data[1] <= first.rows:
            return Known("value", node.data[1], constant=first.constant)
    raise ValueError(f"{node.op} does not take {', '.join(map(str, args))}")


# ---- rules

_A, _B, _U, _V, _W = (Var(n) for n in "ABUVW")


def _apply(a: Pattern, v: Pattern) -> Shape:
    return Shape("apply", (a, v))


def _add(u: Pattern, v: Pattern) -> Shape:
    return Shape("add", (u, v))


def _both(name: str, left: Shape, right: Shape) -> list[Rule]:
    return [Rule(name, left, right), Rule(name, right, left)]


RULES: Mapping[str, Sequence[Rule]] = {
    "assoc": [
        Rule("assoc", _apply(_A, _apply(_B, _V)), _apply(Shape("product", (_A, _B)), _V)),
        *_both("assoc", _add(_U, _add(_V, _W)), _add(_add(_U, _V), _W)),
        Rule("assoc", _add(_U, _V), _add(_V, _U)),
    ],
    "merge": [
        Rule("merge", _add(_apply(_A, _V), _apply(_B, _V)), _apply(Shape("sum", (_A, _B)), _V)),
        Rule("merge", Shape("scale", (_apply(_A, _V),), "s"), _apply(Shape("times", (_A,), "s"), _V)),
        Rule("merge", _apply(_A, Shape("scale", (_V,), "s")), _apply(Shape("times", (_A,), "s"), _V)),
    ],
    "fold": [
        Rule("fold", _apply(_A, _add(_U, _V)), _add(_apply(_A, _U), _apply(_A, _V))),
        Rule(
            "fold",
            Shape("scale", (_add(_U, _V),), "s"),
            _add(Shape("scale", (_U,), "s"), Shape("scale", (_V,), "s")),
        ),
    ],
}
"""Group -> rules. `assoc`: A (B v) is (A B) v; `merge`: sums go into matrices; `fold`: A over sums."""


def joined(graph: EGraph) -> Iterator[tuple[str, int, int]]:
    """Matrices applied to the same value become one with more rows, of which each takes its part."""
    by: dict[int, dict[int, int]] = {}
    for number in graph.classes:
        for node in graph.nodes(number):
            if node.op == "apply" and not graph.known[graph.find(node.args[0])].diagonal:
                matrix, value = map(graph.find, node.args)
                if not graph.known[value].constant and _leaf(graph, matrix):
                    by.setdefault(value, {}).setdefault(matrix, number)
    for value, found in by.items():
        if len(found) < 2:
            continue
        together, *rest = found
        for matrix in rest:
            together = graph.put("rows", together, matrix)
        whole, start = graph.put("apply", together, value), 0
        for matrix, number in found.items():
            count = graph.known[graph.find(matrix)].rows
            yield "concat", number, graph.put("take", whole, data=(start, count))
            start += count


def _leaf(graph: EGraph, matrix: int) -> bool:
    return any(node.op == "matrix" for node in graph.nodes(matrix))


# ---- prices

STARTED = 96_000
"""Bytes that memory moves while one operation starts: overhead times bandwidth of the target cpu-2core."""
_COMPUTED = ("apply", "add", "scale", "take")


def price_of(cost: str, itemsize: int = 4) -> Price:
    """The price of a node for one token: `flops`, stored `bytes`, or `latency`, bytes moved and the start of
    every operation. What does not depend on what comes in is computed once, before any run, and is free.
    """

    def price(node: Node, made: Known, args: Sequence[Known]) -> float:
        if made.kind == "matrix" or made.constant or node.op == "value":
            return 0.0
        numbers = {"apply": args[0].rows if args[0].diagonal else args[0].rows * args[0].columns}.get(
            node.op, 0
        )
        held = numbers + (made.rows if node.op == "add" and any(a.constant for a in args) else 0)
        work = numbers * (1 if args[0].diagonal else 2) + (made.rows if node.op in ("add", "scale") else 0)
        few = 1e-3 * (node.op in _COMPUTED)  # of equal prices, the fewest operations
        if cost == "flops":
            return work + few
        if cost == "bytes":
            return held * itemsize + few
        return held * itemsize + (STARTED if node.op != "take" else 0) + few

    return price


# ---- numbers


def computed(
    term: Term, leaves: Mapping[tuple[str, str], Tensor], memo: dict[Term, Tensor] | None = None
) -> Tensor:
    """What a term is, given its leaves: matrices [o, i], diagonals and vectors [n], values [..., n]."""
    memo = {} if memo is None else memo
    for part in term.parts():
        if part not in memo:
            memo[part] = _computed(part, [memo[a] for a in part.args], leaves)
    return memo[term]


def _computed(term: Term, args: Sequence[Tensor], leaves: Mapping[tuple[str, str], Tensor]) -> Tensor:
    data: Any = term.data
    match term.op:
        case "matrix" | "vector" | "value":
            return leaves[term.op, str(data)]
        case "diag":
            return torch.diag(leaves["diag", str(data)])
        case "product":
            return args[0] @ args[1]
        case "sum" | "add":
            return args[0] + args[1]
        case "times" | "scale":
            scaled: Tensor = args[0] * data
            return scaled
        case "rows":
            return torch.cat((args[0], args[1]))
        case "apply":
            return args[1] @ args[0].T
        case "take":
            cut: Tensor = args[0][..., data[0] : data[0] + data[1]]
            return cut
    raise ValueError(f"there is no term {term.op}")
