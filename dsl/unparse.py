"""Trees back to text: the canonical form of both surfaces. parse(unparse(tree)) == tree, always.

Text keeps comments, and at most one blank line between statements. Names and equal signs of neighboring lines
stand in columns; calls that are wider than a line break between arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from effc.dsl import tree

WIDTH = 100
"""Columns of a line; a single argument that is wider stays whole."""


def unparse(document: tree.Document) -> str:
    """The canonical text of a recipe."""
    statements, comments = list(document.statements), list(document.comments)
    if document.yaml:
        comments = []
    layouts = [_head(s) for s in statements]
    widths = _columns(statements, comments, document.yaml)
    lines: list[str] = []
    taken = 0
    for place, (statement, head, width) in enumerate(zip(statements, layouts, widths, strict=True)):
        start, end = statement.span.start, statement.span.end
        before, taken = _until(comments, taken, start)
        if place and _gap(document, statements[place - 1], statement, before):
            lines.append("")
        lines += _commented(document, before)
        inside, taken = _until(comments, taken, end)
        first = _aligned(head, width)
        body = _statement(statement, len(first), inside)
        lines += [first + body[0], *body[1:]]
        beside, taken = _beside(comments, taken, end, document)
        if beside:
            lines[-1] += f"  {beside}"
    rest = comments[taken:]
    if rest and statements and _blank_between(document, statements[-1].span.end, rest[0].span.start):
        lines.append("")
    lines += _commented(document, rest)
    return "".join(f"{line}\n" for line in lines)


def value(node: tree.Value) -> str:
    """One value on one line."""
    match node:
        case tree.Name(text=text) | tree.Pattern(text=text):
            return text
        case tree.Number():
            return number(node)
        case tree.Text(value=inner):
            return quoted(inner)
        case tree.Constant(value=inner_constant):
            return {True: "true", False: "false", None: "none"}[inner_constant]
        case tree.List(items=items):
            return f"[{', '.join(map(value, items))}]"
        case tree.Table(entries=entries):
            return f"{{{', '.join(map(_entry, entries))}}}"
        case tree.Call():
            return f"{node.name.text}({', '.join(_arguments(node))})"


def number(node: tree.Number) -> str:
    if node.unit is None:
        return node.text
    return f"{node.text}{'' if _attached(node.unit) else ' '}{node.unit}"


def _attached(unit: str) -> bool:
    """Whether the unit stands at its number: 75%, 20M, 20M tokens."""
    return unit == "%" or (unit[0] in "kKMGBT" and (unit[1:2] == " " or (len(unit) == 1 and unit != "B")))


def quoted(text: str) -> str:
    """A string in double quotes; what does not print is escaped."""
    out = ['"']
    for c in text:
        if c in '"\\':
            out.append("\\" + c)
        elif c == "\n":
            out.append("\\n")
        elif c == "\t":
            out.append("\\t")
        else:
            out.append(c if c.isprintable() else f"\\u{{{ord(c):X}}}")
    return "".join((*out, '"'))


def _entry(entry: tree.Entry) -> str:
    return f"{entry.key.text} = {value(entry.value)}"


def _arguments(call: tree.Call) -> list[str]:
    return [*map(value, call.values), *map(_entry, call.named)]


# ---- statements


def _head(statement: tree.Statement) -> tuple[str, str]:
    """The words that are set in columns: keyword and name."""
    match statement:
        case tree.Let(keyword=keyword, name=name):
            return keyword, name.text
        case tree.Bind(keyword="stage", name=name):
            return "", name.text
        case tree.Bind(keyword=keyword, name=name):
            return keyword, name.text
    return "", ""


def _aligned(head: tuple[str, str], width: tuple[int, int]) -> str:
    keyword, name = head
    if not name:
        return ""
    return (f"{keyword:<{width[0]}} " if keyword else "") + f"{name:<{width[1]}} = "


def _columns(
    statements: Sequence[tree.Statement], comments: Sequence[tree.Comment], yaml: bool
) -> list[tuple[int, int]]:
    """Widths of keyword and name for each statement: the widest of the run of lines that it stands in."""
    groups: list[list[int]] = []
    for place, statement in enumerate(statements):
        before = statements[place - 1] if place else None
        if before is not None and _same_run(before, statement, yaml):
            groups[-1].append(place)
        else:
            groups.append([place])
    widths: list[tuple[int, int]] = []
    for group in groups:
        heads = [_head(statements[place]) for place in group]
        width = max(len(h[0]) for h in heads), max(len(h[1]) for h in heads)
        widths += [width] * len(group)
    return widths


def _run(statement: tree.Statement) -> str:
    if isinstance(statement, tree.Let):
        return "let"
    if isinstance(statement, tree.Bind):
        return "stage" if statement.keyword == "stage" else "model"
    return type(statement).__name__


def _same_run(before: tree.Statement, after: tree.Statement, yaml: bool) -> bool:
    if _run(before) != _run(after):
        return False
    text = before.span.source.text[before.span.end : after.span.start]
    return yaml or before.span.source is not after.span.source or _blanks(text) < 1


def _statement(statement: tree.Statement, indent: int, comments: Sequence[tree.Comment]) -> list[str]:
    """The lines of a statement after its head, which is `indent` wide."""
    match statement:
        case tree.Version():
            return _plain(f"effc {number(statement.number)}", comments)
        case tree.Title(name=name, title=title):
            return _plain(f"recipe {name.text}" + (f" {quoted(title.value)}" if title else ""), comments)
        case tree.Use(path=path, alias=alias):
            return _plain(f"use {quoted(path.value)} as {alias.text}", comments)
        case tree.Expect():
            return _plain(f"expect {_side(statement.left)} {statement.op} {_side(statement.right)}", comments)
        case tree.Export(model=model, calls=calls):
            head = f"export {model.text} as "
            return _wrapped(head, [(value(c), c.span.end) for c in calls], "", 0, comments)
    inner = statement.value
    if isinstance(inner, tree.Call):
        spans = [v.span.end for v in inner.values] + [e.span.end for e in inner.named]
        pieces = list(zip(_arguments(inner), spans, strict=True))
        return _wrapped(f"{inner.name.text}(", pieces, ")", indent, comments)
    if isinstance(inner, tree.List):
        pieces = [(value(item), item.span.end) for item in inner.items]
        return _wrapped("[", pieces, "]", indent, comments)
    return _plain(value(inner), comments)


def _plain(text: str, comments: Sequence[tree.Comment]) -> list[str]:
    """One line; comments that stood inside move behind it."""
    return [text + "".join(f"  {c.text}" for c in comments[:1]), *(c.text for c in comments[1:])]


def _wrapped(
    head: str, pieces: Sequence[tuple[str, int]], tail: str, indent: int, comments: Sequence[tree.Comment]
) -> list[str]:
    """`head` piece, piece `tail`, broken at the width; with comments inside, one piece a line."""
    if comments:
        return _one_a_line(head, pieces, tail, indent, comments)
    pad = " " * (indent + len(head))
    lines, room = [head], WIDTH - indent
    for place, (piece, _) in enumerate(pieces):
        piece += "," if place < len(pieces) - 1 else tail
        first = lines[-1] in (head, pad)
        if not first and len(lines[-1]) + 1 + len(piece) > (room if len(lines) == 1 else WIDTH):
            lines.append(pad + piece)
        else:
            lines[-1] += piece if first else f" {piece}"
    if not pieces:
        lines[-1] += tail
    return lines


def _one_a_line(
    head: str, pieces: Sequence[tuple[str, int]], tail: str, indent: int, comments: Sequence[tree.Comment]
) -> list[str]:
    """Each comment stays before the piece it stood before, or behind the piece it stood beside."""
    pad = " " * (indent + len(head))
    todo = list(comments)
    lines: list[str] = [head.rstrip() if todo and pieces and todo[0].span.start < pieces[0][1] else ""]
    opened = bool(lines[0])
    if opened:
        lines[0] = head
    else:
        lines = []
    for place, (piece, end) in enumerate(pieces):
        while todo and todo[0].span.start < end:
            lines.append(pad + todo.pop(0).text)
        last = place == len(pieces) - 1
        line = (pad if lines else head) + piece + ("" if last else ",")
        lines.append(line)
        if todo and not todo[0].alone and (last or todo[0].span.start < pieces[place + 1][1]) and not last:
            lines[-1] += f"  {todo.pop(0).text}"
    if todo:
        lines += [pad + c.text for c in todo]
        return [*_tight(lines), pad + tail if tail else pad.rstrip()] if tail else _tight(lines)
    lines[-1] += tail
    return _tight(lines)


def _tight(lines: Sequence[str]) -> list[str]:
    return [line.rstrip() for line in lines]


def _side(side: tree.Side) -> str:
    base = value(side.base)
    return f"{base} {side.sign} {number(side.amount)}" if side.amount else base


# ---- comments and blank lines


def _until(comments: Sequence[tree.Comment], taken: int, offset: int) -> tuple[list[tree.Comment], int]:
    """Comments from number `taken` that begin before `offset`, and the number of the next."""
    stop = taken
    while stop < len(comments) and comments[stop].span.start < offset:
        stop += 1
    return list(comments[taken:stop]), stop


def _beside(
    comments: Sequence[tree.Comment], taken: int, end: int, document: tree.Document
) -> tuple[str, int]:
    """The comment that stands behind a statement, on its last line."""
    if taken < len(comments) and not comments[taken].alone:
        between = document.source.text[end : comments[taken].span.start]
        if "\n" not in between:
            return comments[taken].text, taken + 1
    return "", taken


def _commented(document: tree.Document, comments: Sequence[tree.Comment]) -> Iterator[str]:
    for place, comment in enumerate(comments):
        if place and _blank_between(document, comments[place - 1].span.end, comment.span.start):
            yield ""
        yield comment.text


def _gap(
    document: tree.Document, before: tree.Statement, after: tree.Statement, comments: Sequence[tree.Comment]
) -> bool:
    """Whether a blank line stands between two statements."""
    if document.yaml or before.span.source is not document.source:
        return _run(before) != _run(after) and not (
            isinstance(before, tree.Version) and isinstance(after, tree.Title)
        )
    start = comments[0].span.start if comments else after.span.start
    return _blank_between(document, before.span.end, start)


def _blank_between(document: tree.Document, start: int, end: int) -> bool:
    return _blanks(document.source.text[start:end]) > 0


def _blanks(text: str) -> int:
    """Empty lines inside a stretch of text."""
    return sum(not line.strip() for line in text.split("\n")[1:-1])
