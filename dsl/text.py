"""The text surface: statements through the grammar's tables to the syntax tree, every broken one reported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from effc.dsl import mistakes
from effc.dsl.build import BUILD
from effc.dsl.lexer import Token, chunks
from effc.dsl.tables import Tables, tables
from effc.dsl.tree import (
    Comment,
    Document,
    Statement,
)
from effc.specs.diagnostic import Diagnostic, EffcError, Label
from effc.specs.source import Source, Span

MOST_PROBLEMS = 50
"""Broken statements after which the rest of a file is not read: it is no recipe."""


def parse(source: Source) -> tuple[Document, list[Diagnostic]]:
    """The tree of all statements that parse, and a diagnostic for each that does not. Raises nothing."""
    statements: list[Statement] = []
    problems: list[Diagnostic] = []
    comments: list[Comment] = []
    broken: set[str] = set()
    for chunk in chunks(source):
        comments += chunk.comments
        if not chunk.tokens and chunk.problem is None:
            continue
        try:
            if chunk.problem:
                raise EffcError(chunk.problem)
            statements.append(_run(source, "statement", chunk.tokens))
        except EffcError as problem:
            problems += problem.diagnostics
            broken |= mistakes.would_bind(chunk.tokens)
        if len(problems) >= MOST_PROBLEMS:
            break
    return Document(tuple(statements), source, tuple(comments), frozenset(broken)), problems


def parse_part(source: Source, start: int, end: int, symbol: str) -> Any:
    """Parse `source.text[start:end]` as a "value" or a "comparison" alone. Raises EffcError."""
    found = list(chunks(source, start, end))
    tokens = [token for chunk in found for token in chunk.tokens]
    for chunk in found:
        if chunk.problem:
            raise EffcError(chunk.problem)
    if not tokens:
        label = Label(Span(source, start, max(end, start + 1)))
        raise EffcError(Diagnostic("E101", "a value is due here", [label]))
    return _run(source, symbol, tokens)


def _run(source: Source, start: str, tokens: Sequence[Token]) -> Any:
    """Shift and reduce one statement. Raises EffcError E101, E103 or E104."""
    grammar = tables()
    first, accepting = grammar.start[start]
    states, values = [first], list[_Node]()
    for token in (*tokens, Token("$END", "", tokens[-1].end, tokens[-1].end)):
        while True:
            actions = grammar.states[states[-1]]
            kind = grammar.keywords.get(token.text, token.type) if token.type == "NAME" else token.type
            kind = kind if kind in actions else token.type
            action = actions.get(kind)
            if action is None:
                raise EffcError(mistakes.explain(source, tokens, token, _due(states, grammar)))
            if action >= 0:
                states.append(action)
                values.append(_Node((Token(kind, *token[1:]),), token.start, token.end))
                break
            node = _reduce(source, grammar, ~action, states, values)
            states.append(grammar.states[states[-1]][grammar.rules[~action].origin])
            values.append(node)
            if kind == "$END" and states[-1] == accepting:
                return node.items[0]
    raise AssertionError("a statement ends with $END")


class _Node(NamedTuple):
    """What stands on the stack: one value, or several where a helper rule dissolves into its parent."""

    items: tuple[Any, ...]
    start: int
    end: int


def _reduce(source: Source, grammar: Tables, rule: int, states: list[int], values: list[_Node]) -> _Node:
    origin, size = grammar.rules[rule].origin, grammar.rules[rule].size
    parts = values[len(values) - size :]
    del states[len(states) - size :], values[len(values) - size :]
    start, end = parts[0].start, parts[-1].end
    items = tuple(item for part in parts for item in part.items)
    if origin.startswith("_"):
        return _Node(items, start, end)
    kept = [i for i in items if not (isinstance(i, Token) and i.type in grammar.dropped)]
    return _Node((BUILD[origin](kept, Span(source, start, end)),), start, end)


def _due(states: Sequence[int], grammar: Tables) -> set[str]:
    """The terminals that could really follow: states that were merged also list some that could not."""
    return {symbol for symbol in grammar.states[states[-1]] if _shifts(list(states), symbol, grammar)}


def _shifts(states: list[int], symbol: str, grammar: Tables) -> bool:
    """Whether `symbol` is a terminal that is taken after some reductions."""
    if not symbol.isupper():  # a rule, which is no terminal
        return False
    while (action := grammar.states[states[-1]].get(symbol)) is not None and action < 0:
        rule = grammar.rules[~action]
        del states[len(states) - rule.size :]
        states.append(grammar.states[states[-1]][rule.origin])
        if symbol == "$END" and states[-1] in {accepting for _, accepting in grammar.start.values()}:
            return True
    return action is not None
