"""Characters to tokens, tokens to statements: where one ends, what is no token, what stays open."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from effc.dsl.tables import tables
from effc.dsl.tree import Comment
from effc.specs.diagnostic import Diagnostic, Label
from effc.specs.source import Source, Span

DEEPEST = 24
"""Brackets inside brackets; recipes need four. Everything that walks a tree may recurse this deep."""

_OPEN = {"LPAR": "(", "LSQB": "[", "LBRACE": "{"}
_CLOSE = {"RPAR": "LPAR", "RSQB": "LSQB", "RBRACE": "LBRACE"}
_PARTNER = {"(": ")", "[": "]", "{": "}"}
_NEEDS_MORE = frozenset(("COMMA", "EQUAL", "SIGN", "COMPARE"))
_GOES_ON = frozenset(("COMMA", "SIGN", "COMPARE", "RPAR", "RSQB", "RBRACE"))

_KEYWORD_LINE = re.compile(r'(?:model|data|param|let|expect|export|use|recipe)[ \t]+[A-Za-z_"]')
_STAGE_LINE = re.compile(r"[A-Za-z_]\w*[ \t]*=")


class Token(NamedTuple):
    type: str
    text: str
    start: int
    end: int


@dataclass(slots=True)
class Chunk:
    """The tokens of one statement; with a problem when they are known not to parse."""

    tokens: list[Token] = field(default_factory=list)
    problem: Diagnostic | None = None
    comments: list[Comment] = field(default_factory=list)


def chunks(source: Source, start: int = 0, end: int | None = None) -> Iterator[Chunk]:
    """The statements of a text, in order. Comments come with the statement that they stand in or before."""
    text, match = source.text, tables().lexer.match
    end = len(text) if end is None else end
    chunk, opened = Chunk(), list[Token]()
    fresh_line, at = True, start
    while at < end:
        found = match(text, at, end)
        if found is None:
            at = _no_token(source, at, end, chunk)
            fresh_line = False
            continue
        kind, at = found.lastgroup or "", found.end()
        token = Token(kind, found.group(), found.start(), at)
        if kind == "BLANK":
            fresh_line = fresh_line or "\n" in token.text
            continue
        if kind == "COMMENT":
            chunk.comments.append(Comment(token.text.rstrip(), Span(source, *token[2:]), _alone(text, token)))
            continue
        if fresh_line and chunk.tokens and _ends(chunk, token, text, bool(opened)):
            if opened:
                chunk.problem = chunk.problem or _unclosed(source, opened[-1])
                opened.clear()
            after = _after(chunk, source)
            yield chunk
            chunk = Chunk(comments=after)
        fresh_line = False
        chunk.tokens.append(token)
        _track(source, token, opened, chunk)
    if opened:
        chunk.problem = chunk.problem or _unclosed(source, opened[-1])
    if chunk.tokens or chunk.problem or chunk.comments:
        yield chunk


def _ends(chunk: Chunk, following: Token, text: str, opened: bool) -> bool:
    """Whether the statement is over at the start of a line that begins with `following`."""
    last = chunk.tokens[-1]
    column_one = following.start == 0 or text[following.start - 1] == "\n"
    if opened:
        if not column_one or chunk.problem:
            return column_one
        stage = last.type not in ("COMMA", *_OPEN, "EQUAL") and _STAGE_LINE.match(text, following.start)
        return bool(stage or _KEYWORD_LINE.match(text, following.start))
    if last.type in _NEEDS_MORE:
        return column_one and bool(_KEYWORD_LINE.match(text, following.start))
    return following.type not in _GOES_ON and following.text != "as" and last.text != "as"


def _track(source: Source, token: Token, opened: list[Token], chunk: Chunk) -> None:
    """Keep the stack of open brackets; note the first that does not fit."""
    if token.type in _OPEN:
        opened.append(token)
        if len(opened) > DEEPEST:
            label = Label(
                Span(source, token.start, token.end), f"this is bracket {len(opened)} inside another"
            )
            chunk.problem = chunk.problem or Diagnostic(
                "E108", f"brackets are nested deeper than {DEEPEST}", [label], help="name the inner values"
            )
    elif token.type in _CLOSE:
        if opened and opened[-1].type == _CLOSE[token.type]:
            opened.pop()
            return
        labels = [Label(Span(source, token.start, token.end), "closed here")]
        first = opened.pop() if opened else None
        if first:
            title = f"`{first.text}` is closed by `{token.text}`"
            labels.insert(0, Label(Span(source, first.start, first.end), "opened here"))
        else:
            title = f"`{token.text}` closes nothing"
        help_ = f"write `{_PARTNER[first.text]}` before it" if first else "take it out"
        chunk.problem = chunk.problem or Diagnostic("E102", title, labels, help=help_)


def _unclosed(source: Source, bracket: Token) -> Diagnostic:
    closing = _PARTNER[bracket.text]
    return Diagnostic(
        "E102",
        f"`{bracket.text}` is never closed",
        [Label(Span(source, bracket.start, bracket.end), "opened here")],
        help=f"add `{closing}` where the values end",
    )


def _no_token(source: Source, at: int, end: int, chunk: Chunk) -> int:
    """Explain a character that starts no token, and skip what belongs to it."""
    text = source.text
    character = text[at]
    line_end = text.find("\n", at, end)
    line_end = end if line_end < 0 else line_end
    stop, help_ = at + 1, None
    if character == '"':
        stop = line_end
        problem = Diagnostic(
            "E103",
            "this string does not end on its line",
            [Label(Span(source, at, min(stop, at + 60)))],
            help='close it with `"`; inside a string, write \\" for a quote',
        )
    elif character == "'":
        closing = text.find("'", at + 1, line_end)
        stop = closing + 1 if closing > 0 else line_end
        inside = text[at + 1 : closing] if closing > 0 else text[at + 1 : stop]
        help_ = f'write "{inside}"' if len(inside) < 60 else 'write "..."'
        problem = Diagnostic(
            "E103", "strings stand in double quotes", [Label(Span(source, at, stop))], help=help_
        )
    elif character in _INSTEAD:
        problem = Diagnostic(
            "E105",
            f"`{character}` has no meaning here",
            [Label(Span(source, at, stop))],
            help=_INSTEAD[character],
        )
    else:
        named = (
            f"`{character}`" if character.isprintable() else f"the control character {ord(character):#04x}"
        )
        problem = Diagnostic(
            "E105",
            f"{named} has no meaning outside a string",
            [Label(Span(source, at, stop))],
            help="take it out; outside strings stand words, numbers and ( ) [ ] { } = , + - < >",
        )
    chunk.problem = chunk.problem or problem
    return stop


_INSTEAD = {
    ":": "write `name = value`; a colon stands only in patterns such as 2:4",
    ";": "end a statement with its line",
    "'": 'write strings in double quotes: "..."',
    "!": "compare with <=, >=, <, > or ==",
    "*": 'write selectors in double quotes, as in "layers[4..11].mlp.*"; recipes do no arithmetic',
    "/": 'write paths in double quotes, as in load("folder/model"); recipes do no arithmetic',
    "%": "write a share as one number, as in 75%",
    "$": "write the bare name; `$name` is for the YAML form",
    "@": "write selectors as strings and methods as family.method(...)",
    ".": "write a full path, as in quantize.gptq or code.train",
}


def _alone(text: str, token: Token) -> bool:
    """Whether only blanks stand before the comment on its line."""
    before = text[text.rfind("\n", 0, token.start) + 1 : token.start]
    return not before.strip()


def _after(chunk: Chunk, source: Source) -> list[Comment]:
    """Take from a finished statement the comments that stand after it on lines of their own."""
    last = chunk.tokens[-1].end
    after = [c for c in chunk.comments if c.span.start >= last and c.alone]
    chunk.comments = [c for c in chunk.comments if c.span.start < last or not c.alone]
    return after
