"""EGraph: many equal terms held at once, in classes, so that rewriting need not choose an order.

A class is a set of nodes that stand for the same value; a node is an operation on classes. Adding a rule's
right side to the class of its left side loses nothing, so rules run until nothing new comes or a limit is
reached; then the cheapest term of a class is taken. Counts of steps and nodes limit it, never a clock, and
everything is visited in the order it was made, so two runs give the same term. References: union-find and
hash-consing with deferred rebuilding as in arXiv 2004.03082; engine of rules as in arXiv 2105.03949.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Term:
    """An operation on terms; `data` is what it is besides (a name, a number)."""

    op: str
    args: tuple[Term, ...] = ()
    data: Hashable = None

    def __str__(self) -> str:
        inner = [] if self.data is None else [str(self.data)]
        inner += map(str, self.args)
        return f"{self.op}({', '.join(inner)})" if inner else self.op

    def parts(self) -> dict[Term, None]:
        """Every term inside, each once, those it is made of first."""
        found: dict[Term, None] = {}
        for arg in self.args:
            found |= arg.parts()
        found[self] = None
        return found


@dataclass(frozen=True, slots=True)
class Node:
    """An operation on classes."""

    op: str
    args: tuple[int, ...]
    data: Hashable = None


@dataclass(frozen=True, slots=True)
class Var:
    """Any class, in a pattern."""

    name: str


@dataclass(frozen=True, slots=True)
class Shape:
    """A pattern: an operation whose arguments are patterns. `data` names what is bound to the node's data."""

    op: str
    args: tuple[Pattern, ...] = ()
    data: str | None = None


Pattern = Var | Shape
Bound = dict[str, Any]
"""Names of a pattern -> classes, and data."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Where `left` stands, `right` is as good. `where` may forbid it by what is known of the classes; data of
    `right` may be made by `makes` from what is bound.
    """

    name: str
    left: Pattern
    right: Pattern
    where: Callable[[EGraph, Bound], bool] = lambda graph, bound: True
    makes: Mapping[str, Callable[[Bound], Hashable]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Saturation:
    """How rewriting ended."""

    done: bool
    """Nothing new came; else a limit stopped it."""
    rounds: int
    nodes: int
    applied: Mapping[str, int]
    """Rule -> how often it made two classes one."""


class EGraph:
    """Classes of equal terms. `known` computes what is known of a node from what is known of its arguments (a
    shape, say); classes that become one must agree on it.
    """

    def __init__(self, known: Callable[[Node, Sequence[Any]], Any] = lambda node, args: None) -> None:
        self._known_of = known
        self._parent: list[int] = []
        self._nodes: dict[int, dict[Node, None]] = {}
        self._seen: dict[Node, int] = {}
        self._uses: dict[int, dict[Node, int]] = {}
        self._broken: list[int] = []
        self.known: dict[int, Any] = {}
        """Class -> what is known of it."""

    # -- building

    def find(self, number: int) -> int:
        """The class that a number means now."""
        root = number
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[number] != root:
            self._parent[number], number = root, self._parent[number]
        return root

    def put(self, op: str, *args: int, data: Hashable = None) -> int:
        """The class of an operation on classes.

        Raises:
            ValueError: what is known of the arguments does not fit the operation.
        """
        return self._put(Node(op, tuple(self.find(a) for a in args), data))

    def add(self, term: Term) -> int:
        """The class of a term. Parts that stand in it more than once are added once."""
        classes: dict[Term, int] = {}
        for part in term.parts():
            classes[part] = self.put(part.op, *(classes[a] for a in part.args), data=part.data)
        return classes[term]

    def _put(self, node: Node) -> int:
        if (found := self._seen.get(node)) is not None:
            return self.find(found)
        known = self._known_of(node, [self.known[a] for a in node.args])
        number = len(self._parent)
        self._parent.append(number)
        self._nodes[number] = {node: None}
        self._uses[number] = {}
        self._seen[node] = number
        self.known[number] = known
        for arg in node.args:
            self._uses[arg][node] = number
        return number

    def unite(self, a: int, b: int) -> bool:
        """Say that two classes are equal; False when they were. The older number stays.

        Raises:
            ValueError: what is known of them differs, so they cannot be equal.
        """
        a, b = sorted((self.find(a), self.find(b)))
        if a == b:
            return False
        if self.known[a] != self.known[b]:
            raise ValueError(f"classes of {self.known[a]} and {self.known[b]} cannot be equal")
        self._parent[b] = a
        self._nodes[a] |= self._nodes.pop(b)
        self._uses[a] |= self._uses.pop(b)
        self._broken.append(a)
        return True

    def rebuild(self) -> None:
        """Make equal what is an equal operation on classes that have become equal."""
        while self._broken:
            todo, self._broken = dict.fromkeys(map(self.find, self._broken)), []
            for number in todo:
                self._repair(self.find(number))

    def _repair(self, number: int) -> None:
        uses, fresh = self._uses[number], {}
        for node, user in list(uses.items()):
            self._seen.pop(node, None)
            now = self._canonical(node)
            known = self._seen.get(now)
            if known is not None:
                self.unite(known, user)
            self._seen[now] = self.find(user)
            fresh[now] = self.find(user)
        self._uses[self.find(number)] = self._uses[self.find(number)] | fresh
        for user in dict.fromkeys(fresh.values()):
            owner = self.find(user)
            self._nodes[owner] = dict.fromkeys(map(self._canonical, self._nodes[owner]))

    def _canonical(self, node: Node) -> Node:
        return Node(node.op, tuple(self.find(a) for a in node.args), node.data)

    # -- looking

    @property
    def classes(self) -> list[int]:
        """Numbers of all classes, oldest first."""
        return sorted(self._nodes)

    def nodes(self, number: int) -> list[Node]:
        """The nodes of a class, in the order they came."""
        return list(self._nodes[self.find(number)])

    @property
    def size(self) -> int:
        return sum(map(len, self._nodes.values()))

    def matches(self, pattern: Pattern) -> Iterator[tuple[int, Bound]]:
        """Every class where a pattern holds, with what its names mean there."""
        for number in self.classes:
            for bound in self._match(pattern, number, {}):
                yield number, bound

    def _match(self, pattern: Pattern, number: int, bound: Bound) -> Iterator[Bound]:
        number = self.find(number)
        if isinstance(pattern, Var):
            if pattern.name not in bound:
                yield bound | {pattern.name: number}
            elif self.find(bound[pattern.name]) == number:
                yield bound
            return
        for node in self.nodes(number):
            if node.op != pattern.op or len(node.args) != len(pattern.args):
                continue
            start = bound if pattern.data is None else bound | {pattern.data: node.data}
            yield from self._match_all(pattern.args, node.args, start)

    def _match_all(self, patterns: Sequence[Pattern], args: Sequence[int], bound: Bound) -> Iterator[Bound]:
        if not patterns:
            yield bound
            return
        for more in self._match(patterns[0], args[0], bound):
            yield from self._match_all(patterns[1:], args[1:], more)

    # -- rewriting

    def saturate(
        self,
        rules: Sequence[Rule],
        rounds: int = 30,
        nodes: int = 20_000,
        more: Callable[[EGraph], Iterator[tuple[str, int, int]]] | None = None,
    ) -> Saturation:
        """Apply rules until nothing new comes, or for so many rounds, or up to so many nodes.

        `more` finds equalities that no pattern tells: (name of the rule, class, class).
        """
        applied: dict[str, int] = {}
        for number in range(rounds):
            before = (self.size, len(self._nodes))
            found = [(rule, where, bound) for rule in rules for where, bound in self.matches(rule.left)]
            for rule, where, bound in found:
                if self.size >= nodes:
                    self.rebuild()
                    return Saturation(False, number + 1, self.size, applied)
                if rule.where(self, bound) and self.unite(where, self._make(rule.right, bound, rule.makes)):
                    applied[rule.name] = applied.get(rule.name, 0) + 1
            for name, a, b in more(self) if more is not None else ():
                if self.unite(a, b):
                    applied[name] = applied.get(name, 0) + 1
            self.rebuild()
            if (self.size, len(self._nodes)) == before:
                return Saturation(True, number + 1, self.size, applied)
        return Saturation(False, rounds, self.size, applied)

    def _make(self, pattern: Pattern, bound: Bound, makes: Mapping[str, Callable[[Bound], Hashable]]) -> int:
        if isinstance(pattern, Var):
            return self.find(bound[pattern.name])
        args = [self._make(arg, bound, makes) for arg in pattern.args]
        data: Hashable = None
        if pattern.data is not None:
            data = makes[pattern.data](bound) if pattern.data in makes else bound[pattern.data]
        return self.put(pattern.op, *args, data=data)
