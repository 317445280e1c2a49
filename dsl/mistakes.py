"""What a person meant who wrote something that does not parse: a title and a remedy for each mistake."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from itertools import pairwise
from math import isinf

from effc.dsl.lexer import Token
from effc.specs.diagnostic import Diagnostic, Label
from effc.specs.source import Source, Span

LONGEST_NUMBER = 40
KEYWORDS = ("model", "data", "param", "let", "expect", "export", "use", "recipe")
_VALUES = frozenset(("NAME", "NUMBER", "STRING", "PATTERN", "LSQB", "LBRACE"))
_FORMS = {
    "model": 'model NAME = load("...")',
    "data": "data NAME = corpus(...)",
    "param": "param NAME = VALUE",
    "let": "let NAME = VALUE",
    "expect": "expect MODEL.METRIC <= VALUE",
    "export": 'export MODEL as FORMAT("...")',
    "use": 'use "FILE.effc" as NAME',
    "recipe": 'recipe NAME "TITLE"',
}
_PLAIN = {
    "NAME": "a name", "NUMBER": "a number", "STRING": "a string", "COMPARE": "<=, >=, <, > or ==",
    "EQUAL": "`=`", "COMMA": "`,`", "LPAR": "`(`", "RPAR": "`)`", "RSQB": "`]`", "RBRACE": "`}`",
    "AS": "`as`", "$END": "the end of the line", "SIGN": "`+` or `-`",
}  # fmt: skip


def explain(source: Source, tokens: Sequence[Token], wrong: Token, due: set[str]) -> Diagnostic:
    """E101 for a token that the grammar does not take where it stands; `due` are those it would take."""
    place = len(tokens) if wrong.type == "$END" else tokens.index(wrong)
    before = tokens[place - 1] if place else None
    title, help_ = _said(tokens, place, before, wrong, due)
    if title.startswith("no statement begins"):
        wrong = tokens[0]
    span = Span(source, wrong.start, max(wrong.end, wrong.start + 1))
    return Diagnostic("E101", title, [Label(span)], help=help_)


def _said(
    tokens: Sequence[Token], place: int, before: Token | None, wrong: Token, due: set[str]
) -> tuple[str, str | None]:
    first = tokens[0].text
    found = f"`{wrong.text[:40]}`" if wrong.text else "the end of the line"
    if before is None:
        return f"no statement begins with {found}", "statements: " + ", ".join(
            _FORMS.values()
        ) + ", NAME = stage"
    if place == 1 and tokens[0].type == "NAME" and first not in _FORMS and wrong.type in ("NAME", "STRING"):
        near = get_close_matches(first, (*KEYWORDS, "effc"), n=1, cutoff=0.6)
        return f"no statement begins with `{first}`", (
            f"did you mean `{near[0]}`?"
            if near
            else f"it has: {', '.join(KEYWORDS)}, or NAME = family.method(...)"
        )
    if place == 1 and first in _FORMS and wrong.type == "EQUAL":
        return f"`{first}` is a word of the language and cannot be bound", f"write {_FORMS[first]}"
    if place == 1 and "EQUAL" in due and "." not in first and wrong.type == "LPAR":
        return "the result has no name", f"bind it: NAME = {first}(...)"
    if place == 1 and "." in first and wrong.type in ("LPAR", "EQUAL"):
        return (
            ("the result has no name", f"bind it: NAME = {first}(...)")
            if wrong.type == "LPAR"
            else (f"`{first}` cannot be bound: a name is one word", None)
        )
    if wrong.text in ("=", "==") and wrong.type == "COMPARE":
        return "`==` compares; one `=` binds and gives arguments", "write `name = value`"
    if first == "expect" and "COMPARE" in due and wrong.type != "EQUAL":
        return f"{found} stands where the comparison is due", f"write {_FORMS['expect']}"
    if wrong.type == "EQUAL" and "COMPARE" in due:
        return "`=` does not compare", "write <=, >=, <, > or =="
    if wrong.type == "EQUAL" and before.type == "STRING":
        return "the name of an argument stands without quotes", f"write {before.text[1:-1]} = ..."
    if wrong.type in _VALUES - {"NAME"} and "EQUAL" in due and before.type == "NAME":
        return (
            f"`=` is missing between `{before.text}` and {found}",
            f"write {before.text} = {wrong.text[:40]}",
        )
    if wrong.type in _VALUES and "COMMA" in due:
        return f"a `,` is missing before {found}", f"write `, {wrong.text[:40]}`"
    if wrong.type in _VALUES and "LPAR" in due and before.type == "NAME" and first not in ("expect",):
        return f"{found} follows `{before.text}` with nothing between", None
    if before.type == "EQUAL" and wrong.type in ("RPAR", "COMMA", "RSQB", "RBRACE"):
        name = tokens[place - 2].text if place > 1 else "name"
        return f"a value is missing after `{name} =`", f"write {name} = VALUE, or take it out"
    if wrong.type == "COMMA" and before.type in ("COMMA", "LPAR", "LSQB", "LBRACE"):
        return "a value is missing before this `,`", "take the `,` out"
    if wrong.type == "$END" and first in _FORMS:
        return f"this `{first}` is not finished", f"write {_FORMS[first]}"
    if wrong.type == "$END" and before.type == "EQUAL":
        return "nothing stands after `=`", "write a value, or family.method(...)"
    if wrong.type == "$END" and place == 1:
        return f"a line holds only `{first}`", "write NAME = family.method(...)"
    if "$END" in due and first == "recipe" and wrong.text.startswith("-"):
        return f"{found} cannot stand in a name", "join the words of a name by `_`"
    if "$END" in due and not due & {"COMMA", "SIGN"}:
        return f"{found} follows a finished statement", "begin a new line for a new statement"
    if first in _FORMS and place <= 3:
        return f"{_options(due)} is due here, not {found}", f"write {_FORMS[first]}"
    return f"{_options(due)} is due here, not {found}", None


def _options(due: set[str]) -> str:
    if due >= _VALUES:
        return "a value"
    words = [_PLAIN[kind] for kind in _PLAIN if kind in due]
    return " or ".join((", ".join(words[:-1]), words[-1]) if len(words) > 1 else words or ["something else"])


def would_bind(tokens: Sequence[Token]) -> set[str]:
    """Names that a broken statement meant to bind, so that their uses are not reported as well."""
    words = [t for t in tokens[:3] if t.type == "NAME"]
    bound = pairwise(tokens)
    names = {word.text for word in words[:2]} - set(KEYWORDS)
    names |= {name.text for name, equal in bound if name.type == "NAME" and equal.type == "EQUAL"}
    if tokens and tokens[0].text == "use":
        names |= {t.text for t in tokens[-1:]}
    return names


def wrong_number(digits: str) -> tuple[str, str | None] | None:
    """What is wrong with a literal's digits, and what to write; None when nothing is."""
    if len(digits) > LONGEST_NUMBER:
        return (
            f"a number has at most {LONGEST_NUMBER} digits, not {len(digits)}",
            "write it with an exponent or a unit",
        )
    if "_" in digits:
        return "digits are written without `_`", f"write {digits.replace('_', '')}"
    if len(digits) > 1 and digits.isdigit() and digits[0] == "0":
        return "whole numbers do not begin with 0", f"write {digits.lstrip('0') or '0'}"
    if isinf(float(digits)):
        return f"`{digits}` is too large for any argument", None
    return None
