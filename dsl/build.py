"""One builder a rule of the grammar: what is left of its symbols, and the span, to a node of the tree."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

from effc.dsl import mistakes
from effc.dsl.lexer import Token
from effc.dsl.tree import (
    Bind,
    Call,
    Constant,
    Entry,
    Expect,
    Export,
    Let,
    List,
    Name,
    Number,
    Pattern,
    Side,
    Table,
    Text,
    Title,
    Use,
    Value,
    Version,
    Word,
)
from effc.specs.diagnostic import Diagnostic, EffcError, Label
from effc.specs.source import Span

_CONSTANTS: dict[str, bool | None] = {"true": True, "false": False, "none": None}
_ESCAPES = {"n": "\n", "t": "\t", '"': '"', "\\": "\\"}
_ESCAPE = re.compile(r"\\(u\{[0-9A-Fa-f]{1,6}\}|[^\n])")


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


BUILD: dict[str, Callable[[list[Any], Span], Any]] = {
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
