"""The text surface: statements through the grammar's tables to the syntax tree, every broken one reported."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from effc.dsl import mistakes
from effc.dsl.lexer import Token, chunks
from effc.dsl.tables import Tables, tables
from effc.dsl.tree import (
    Bind,
    Call,
    Comment,
    Constant,
    Document,
    Entry,
    Expect,
    Export,
    Let,
    List,
    Name,
    Number,
    Pattern,
    Side,
    Statement,
    Table,
    Text,
    Title,
    Use,
    Value,
    Version,
    Word,
)
from effc.specs.diagnostic import Diagnostic, EffcError, Label
from effc.specs.source import Source, Span

MOST_PROBLEMS = 50
"""Broken statements after which the rest of a file is not read: it is no recipe."""

_CONSTANTS: dict[str, bool | None] = {"true": True, "false": False, "none": None}
_ESCAPES = {"n": "\n", "t": "\t", '"': '"', "\\": "\\"}
_ESCAPE = re.compile(r"\\(u\{[0-9A-Fa-f]{1,6}\}|[^\n])")


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
    return _Node((_BUILD[origin](kept, Span(source, start, end)),), start, end)


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


# ---- one builder a rule: what is left of its symbols, and the span -> a node of the tree


def _only(items: list[Any], span: Span) -> Any:
    return items[0]


def _title(items: list[Any], span: Span) -> Title:
    text = _string(items[1:], _spot(items[1], span)) if len(items) > 1 else None
    return Title(_word(items[0], span), text, span)


def _constant(items: list[Any], span: Span) -> Let:
    keyword, name, value = items
    return Let("param" if keyword.text == "param" else "let", _word(name, span), value, span)


def _binding(items: list[Any], span: Span) -> Bind:
    *keyword, name, value = items
    word: Literal["model", "data"] | None = keyword[0].text if keyword else None
    return Bind(word or "stage", _word(name, span), value, span)


def _use(items: list[Any], span: Span) -> Use:
    return Use(_string(items[:1], _spot(items[0], span)), _word(items[1], span), span)


def _comparison(items: list[Any], span: Span) -> Expect:
    left, op, right = items
    return Expect(left, op.text, right, span)


def _expect(items: list[Any], span: Span) -> Expect:
    inner: Expect = items[0]
    return Expect(inner.left, inner.op, inner.right, span)


def _side(items: list[Any], span: Span) -> Side:
    base, *moved = items
    return Side(base, moved[0].text, moved[1], span) if moved else Side(base, None, None, span)


def _export(items: list[Any], span: Span) -> Export:
    return Export(_word(items[0], span), tuple(items[1:]), span)


def _call(items: list[Any], span: Span) -> Call:
    name, *given = items
    named = [item for item in given if isinstance(item, Entry)]
    for before, item in pairwise(given):
        if isinstance(before, Entry) and not isinstance(item, Entry):
            raise EffcError(
                Diagnostic(
                    "E101",
                    "a value without a name stands after `name = value`",
                    [Label(item.span)],
                    help="write its name before it, or move it to the front",
                )
            )
    values = tuple(item for item in given if not isinstance(item, Entry))
    return Call(_word(name, span), values, tuple(named), span)


def _item(items: list[Any], span: Span) -> Entry | Value:
    return _entry(items, span) if len(items) == 2 else items[0]


def _entry(items: list[Any], span: Span) -> Entry:
    key: Token = items[0]
    if "." in key.text:
        raise EffcError(
            Diagnostic(
                "E101",
                f"`{key.text}` cannot name an argument",
                [Label(_spot(key, span))],
                help=f"an argument is one word: `{key.text.rpartition('.')[2]} = ...`",
            )
        )
    return Entry(_word(key, span), items[1])


def _name(items: list[Any], span: Span) -> Name | Constant:
    text = items[0].text
    return Constant(_CONSTANTS[text], span) if text in _CONSTANTS else Name(text, span)


def _string(items: list[Any], span: Span) -> Text:
    inside = items[0].text[1:-1]
    if "\\" not in inside:
        return Text(inside, span)
    for found in _ESCAPE.finditer(inside):
        if _escape(found) is None:
            at = span.start + 1 + found.start()
            label = Label(Span(span.source, at, at + 2))
            help_ = 'inside a string: \\" \\\\ \\n \\t \\u{1F600}; write a path with / or \\\\'
            raise EffcError(Diagnostic("E103", f"`{found[0]}` is no escape", [label], help=help_))
    return Text(_ESCAPE.sub(lambda found: _escape(found) or "", inside), span)


def _escape(found: re.Match[str]) -> str | None:
    letter = found[1]
    if letter[0] != "u" or letter == "u":
        return _ESCAPES.get(letter)
    point = int(letter[2:-1], 16)
    return chr(point) if point <= 0x10FFFF and not 0xD800 <= point <= 0xDFFF else None


def _number(items: list[Any], span: Span) -> Number:
    sign = items[0].text if items[0].type == "SIGN" else ""
    return number("" if sign == "+" else sign, items[-1].text, span)


def number(sign: str, text: str, span: Span) -> Number:
    """A literal as written to a Number. Raises EffcError E104."""
    digits = _DIGITS.match(text)
    assert digits is not None
    value, unit = digits[0], " ".join(text[digits.end() :].split())
    joined = re.fullmatch(r"([kKMGBT]) ?([a-z]{2,})", unit)
    unit = f"{joined[1]} {joined[2]}" if joined and not unit.endswith("bytes") else unit
    problem = mistakes.wrong_number(value)
    if problem:
        title, help_ = problem
        raise EffcError(Diagnostic("E104", title, [Label(span)], help=help_))
    return Number(sign + value, unit or None, span)


_DIGITS = re.compile(r"[0-9.][0-9_.]*(?:[eE][+-]?[0-9]+)?")


def _word(token: Token, span: Span) -> Word:
    return Word(token.text, _spot(token, span))


def _spot(token: Token, span: Span) -> Span:
    return Span(span.source, token.start, token.end)


_BUILD: dict[str, Callable[[list[Any], Span], Any]] = {
    "statement": _only,
    "value": _only,
    "version": lambda items, span: Version(_number(items, _spot(items[0], span)), span),
    "title": _title,
    "constant": _constant,
    "binding": _binding,
    "use": _use,
    "expect": _expect,
    "comparison": _comparison,
    "side": _side,
    "export": _export,
    "call": _call,
    "item": _item,
    "list": lambda items, span: List(tuple(items), span),
    "table": lambda items, span: Table(tuple(items), span),
    "entry": _entry,
    "name": _name,
    "string": _string,
    "pattern": lambda items, span: Pattern(items[0].text, span),
    "number": _number,
}
