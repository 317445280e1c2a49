"""Pattern: places in a graph, written as `norm -> linear`. Here the text is read; `match` finds the places.

    pattern   = chain (";" chain)*
    chain     = step ("->" step)*
    step      = element | "{" chain ("," chain)* "}"
    element   = "$" NAME | [NAME ":"] word ("|" word)* ["[" condition ("," condition)* "]"]
    word      = "*" | "input" | a role (mlp.up) | a type of block (MLP) | a function or operator (add)
    condition = FIELD ("=" | "!=" | "<" | "<=" | ">" | ">=") VALUE

`a -> b` says that b reads what a gives, `a -> {b, c}` that both read it, `{b, c} -> d` that d reads both.
`$x` is the element captured as x, met again: `x: add -> norm -> mlp -> y: add; $x -> $y`. Different elements
are different nodes. The fields that conditions may name stand in `effc.compiler.view`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Literal, NoReturn

from effc.specs.diagnostic import Diagnostic, EffcError, Label
from effc.specs.source import Source

if TYPE_CHECKING:
    from effc.compiler.match import Hit
    from effc.compiler.model import Model

Over = Literal["blocks", "ops"]
Value = float | bool | str | None

LONGEST = 2000
"""Characters of a pattern."""
MOST = 32
"""Elements of a pattern; bounds what a search can cost."""

_TOKEN = re.compile(r"->|[{}\[\],;:$|*]|!=|[<>]=?|=|[-+]?\d[\w.]*?[eE][-+]\d+\b|[-+]?[\w.]+|\S")
_NAME = re.compile(r"[A-Za-z_]\w*\Z")
_WORD = re.compile(r"[A-Za-z_][\w.]*\Z")
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?\Z")
_SIGNS = ("=", "!=", "<", "<=", ">", ">=")
_PLAIN: dict[str, Value] = {"true": True, "false": False, "none": None}
_HELP = "write roles, types or operators with arrows between, such as norm -> linear"


@dataclass(frozen=True, slots=True)
class Condition:
    """One field against one value: `in<=4096`."""

    field: str
    sign: str
    value: Value

    def met(self, found: Value) -> bool:
        """Whether a node whose field is `found` meets it; sizes compare with numbers only."""
        if self.sign in ("=", "!="):
            same = found == self.value and isinstance(found, bool) == isinstance(self.value, bool)
            return same == (self.sign == "=")
        if isinstance(found, bool | str | None) or isinstance(self.value, bool | str | None):
            return False
        match self.sign:
            case "<":
                return found < self.value
            case "<=":
                return found <= self.value
            case ">":
                return found > self.value
        return found >= self.value


@dataclass(frozen=True, slots=True)
class Element:
    """One node of a pattern: what it may be, what must hold of it, and the name it is captured under."""

    capture: str
    words: tuple[str, ...]
    conditions: tuple[Condition, ...] = ()


@dataclass(frozen=True, slots=True)
class Pattern:
    """Elements and who reads whom, as pairs of their numbers; `where` judges a hit as a whole."""

    text: str
    elements: tuple[Element, ...]
    edges: tuple[tuple[int, int], ...]
    over: Over = "blocks"
    where: Callable[[Model, Hit], bool] | None = field(default=None, compare=False)


def pattern(text: str, over: Over = "blocks", where: Callable[[Model, Hit], bool] | None = None) -> Pattern:
    """Read `n: norm[users=1] -> linear`; the grammar stands at the top of `effc.compiler.pattern`.

    A capture name stands before a colon; without one, the word itself is it (a word that comes again gets a
    number: linear, linear2; `*` is any). `over` says whether nodes of the block graph are meant or the ops
    that blocks consist of. `where` gets the model and a hit that meets the text, and may still say no.

    Raises:
        EffcError: E404 when the text does not parse, with the place.
    """
    if over not in ("blocks", "ops"):
        raise EffcError(
            Diagnostic("E404", f"a pattern is over blocks or over ops, not {over!r}", help='over="ops"')
        )
    reader = _Reader(text)
    reader.read()
    elements = tuple(reader.named())
    edges = tuple(dict.fromkeys(reader.edges))
    _acyclic(reader, elements, edges)
    _connected(reader, elements, edges)
    return Pattern(text, elements, edges, over, where)


@dataclass(slots=True)
class _Draft:
    """An element as written."""

    given: str | None
    words: list[str]
    conditions: list[Condition]


class _Reader:
    """Recursive descent; every step gives the numbers of the elements it starts and ends with."""

    def __init__(self, text: str) -> None:
        self.source = Source("pattern", text)
        self.tokens = [(m[0], m.start(), m.end()) for m in _TOKEN.finditer(text[:LONGEST])]
        self.place = 0
        self.drafts: list[_Draft] = []
        self.edges: list[tuple[int, int]] = []
        if len(text) > LONGEST:
            self.fail(
                f"the pattern has {len(text)} characters, at most {LONGEST} fit", help="name fewer nodes"
            )

    def read(self) -> None:
        self.chain()
        while self.took(";"):
            self.chain()
        if self.next:
            self.unexpected()

    def chain(self) -> tuple[list[int], list[int]]:
        starts, ends = self.step()
        while self.took("->"):
            begin, finish = self.step()
            self.edges += [(a, b) for a in ends for b in begin]
            ends = finish
        return starts, ends

    def step(self) -> tuple[list[int], list[int]]:
        if not self.took("{"):
            one = [self.element()]
            return one, one
        starts, ends = self.chain()
        while self.took(","):
            begin, finish = self.chain()
            starts, ends = starts + begin, ends + finish
        self.expect("}", "close the branches with }")
        return starts, ends

    def element(self) -> int:
        if self.took("$"):
            name = self.take()
            for number, draft in enumerate(self.drafts):
                if draft.given == name or (draft.given is None and draft.words[0] == name):
                    return number
            self.fail(
                f"`${name}` is captured nowhere before",
                back=1,
                help=f"name an element first, as in {name or 'x'}: add -> norm",
            )
        given = None
        if _NAME.match(self.next) and self.after == ":":
            given = self.take()
            self.take()
            if any(draft.given == given for draft in self.drafts):
                self.fail(
                    f"`{given}` is captured twice",
                    back=2,
                    help=f"use another name, or ${given} for the same node",
                )
        words = [self.word()]
        while self.took("|"):
            words.append(self.word())
        conditions = []
        if self.took("["):
            conditions.append(self.condition())
            while self.took(","):
                conditions.append(self.condition())
            self.expect("]", "close the conditions with ]")
        self.drafts.append(_Draft(given, words, conditions))
        if len(self.drafts) > MOST:
            self.fail(f"the pattern has more than {MOST} elements", help="look for a smaller piece")
        return len(self.drafts) - 1

    def word(self) -> str:
        if self.next != "*" and not _WORD.match(self.next):
            self.unexpected()
        return self.take()

    def condition(self) -> Condition:
        name = self.next
        if not _NAME.match(name):
            self.unexpected("write a field and a value, such as users=1")
        self.take()
        if self.next not in _SIGNS:
            self.fail(
                f"`{self.next}` does not compare" if self.next else f"`{name}` is compared with nothing",
                help=f"write {name}=VALUE, or one of {' '.join(_SIGNS[1:])}",
            )
        sign = self.take()
        text = self.next
        if not (_NUMBER.match(text) or _WORD.match(text)):
            self.unexpected(f"write a number or a word behind {name}{sign}")
        self.take()
        value: Value = _PLAIN.get(text, text)
        if _NUMBER.match(text):
            value = float(text) if any(c in text for c in ".eE") else int(text)
        elif sign not in ("=", "!="):
            self.fail(
                f"`{name}{sign}{text}` compares sizes, and `{text}` is no number",
                back=1,
                help=f"write {name}={text} or {name}!={text}",
            )
        return Condition(name, sign, value)

    def named(self) -> Iterator[Element]:
        """Every element under a name of its own; names that were given come first."""
        used = {draft.given for draft in self.drafts}
        for draft in self.drafts:
            fresh = draft.given
            if fresh is None:
                base = draft.words[0].replace("*", "any")
                fresh, n = base, 2
                while fresh in used:
                    fresh, n = f"{base}{n}", n + 1
                used.add(fresh)
            yield Element(fresh, tuple(draft.words), tuple(draft.conditions))

    # -- tokens

    @property
    def next(self) -> str:
        return self.tokens[self.place][0] if self.place < len(self.tokens) else ""

    @property
    def after(self) -> str:
        return self.tokens[self.place + 1][0] if self.place + 1 < len(self.tokens) else ""

    def take(self) -> str:
        text = self.next
        self.place += 1
        return text

    def took(self, text: str) -> bool:
        found = self.next == text
        self.place += found
        return found

    def expect(self, text: str, help: str) -> None:
        if not self.took(text):
            self.unexpected(help)

    def unexpected(self, help: str = _HELP) -> NoReturn:
        said = f"`{self.next}` is no element of a pattern" if self.next else "the pattern ends too early"
        self.fail(said, help=help)

    def fail(self, title: str, back: int = 0, help: str | None = None) -> NoReturn:
        place = max(0, self.place - back)
        end = len(self.source.text)
        span = self.tokens[place][1:] if place < len(self.tokens) else (end, end)
        raise EffcError(Diagnostic("E404", title, (Label(self.source.span(*span)),), help=help))


def _acyclic(reader: _Reader, elements: Sequence[Element], edges: Sequence[tuple[int, int]]) -> None:
    graph: dict[int, list[int]] = {}
    for a, b in edges:
        graph.setdefault(b, []).append(a)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        name = elements[error.args[1][0]].capture
        reader.fail(f"`{name}` reads itself", back=1, help="arrows lead from what is read to what reads it")


def _connected(reader: _Reader, elements: Sequence[Element], edges: Sequence[tuple[int, int]]) -> None:
    near, todo = {0}, [0]
    while todo:
        here = todo.pop()
        for a, b in edges:
            if here in (a, b) and (other := a + b - here) not in near:
                near.add(other)
                todo.append(other)
    if apart := [e.capture for i, e in enumerate(elements) if i not in near]:
        reader.fail(
            f"`{apart[0]}` hangs together with nothing before it",
            back=1,
            help="join the parts with an arrow, or look for them with two patterns",
        )
