"""Trees to the YAML twin: sections in a fixed order, one stage an item, bindings with their `$`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from effc.dsl import tree
from effc.dsl.unparse import number, value
from effc.dsl.yaml_values import NAME

WIDTH = 100
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*\Z")
_WORDS = frozenset(("true", "false", "none", "null", "yes", "no", "on", "off", "y", "n"))


def to_yaml(document: tree.Document) -> str:
    """The YAML form; comments are not kept."""
    bound = _bound(document)
    lines: list[str] = []
    for kind in (tree.Version, tree.Title):
        for statement in document.statements:
            if isinstance(statement, kind):
                lines += _head(statement)
    sections = (
        ("use", [f"  {s.alias.text}: {_string(s.path.value)}" for s in _of(document, tree.Use)]),
        ("params", [_let(s, bound) for s in _of(document, tree.Let) if s.keyword == "param"]),
        ("let", [_let(s, bound) for s in _of(document, tree.Let) if s.keyword == "let"]),
        ("models", [_binding(s, bound, "  ") for s in _of(document, tree.Bind) if s.keyword == "model"]),
        ("data", [_binding(s, bound, "  ") for s in _of(document, tree.Bind) if s.keyword == "data"]),
        ("stages", [_binding(s, bound, "  - ") for s in _of(document, tree.Bind) if s.keyword == "stage"]),
        ("expects", [f"  - {_quoted(_expect(s))}" for s in _of(document, tree.Expect)]),
        ("exports", list(_exports(_of(document, tree.Export), bound))),
    )
    for name, inside in sections:
        if inside:
            lines += [f"{name}:", *inside]
    return "".join(f"{line}\n" for line in lines)


def canonical(document: tree.Document) -> tuple[tree.Statement, ...]:
    """The statements in the order of the YAML sections, exports of one model together."""
    order = {
        tree.Version: 0,
        tree.Title: 1,
        tree.Use: 2,
        tree.Let: 3,
        tree.Bind: 5,
        tree.Expect: 8,
        tree.Export: 9,
    }
    later = {"let": 1, "data": 1, "stage": 2}

    def rank(statement: tree.Statement) -> int:
        return order[type(statement)] + later.get(getattr(statement, "keyword", ""), 0)

    inner = sorted((s for s in document.statements if not isinstance(s, tree.Export)), key=rank)
    return (*inner, *_joined(_of(document, tree.Export)))


def _joined(exports: Sequence[tree.Export]) -> Iterator[tree.Export]:
    """One export a model, in order of first mention: a YAML mapping has each key once."""
    grouped: dict[str, list[tree.Export]] = {}
    for export in exports:
        grouped.setdefault(export.model.text, []).append(export)
    for group in grouped.values():
        yield tree.Export(group[0].model, tuple(c for e in group for c in e.calls), group[0].span)


def _of(document: tree.Document, kind: type) -> list:  # type: ignore[type-arg]
    return [s for s in document.statements if isinstance(s, kind)]


def _bound(document: tree.Document) -> frozenset[str]:
    """Names that mean a binding or a constant, and so take a `$`."""
    names = {s.name.text for s in document.statements if isinstance(s, tree.Let | tree.Bind)}
    return frozenset(names | {s.alias.text for s in document.statements if isinstance(s, tree.Use)})


def _head(statement: tree.Version | tree.Title) -> list[str]:
    if isinstance(statement, tree.Version):
        return [f"effc: {number(statement.number)}"]
    if statement.title is None:
        return [f"recipe: {_word(statement.name.text)}"]
    return [f"recipe: {{name: {_word(statement.name.text)}, title: {_quoted(statement.title.value)}}}"]


def _let(statement: tree.Let, bound: frozenset[str]) -> str:
    return f"  {_word(statement.name.text)}: {_value(statement.value, bound)}"


def _binding(statement: tree.Bind, bound: frozenset[str], lead: str) -> str:
    """One line where it fits, else an argument a line."""
    name = f"{lead}{_word(statement.name.text)}:"
    if not isinstance(statement.value, tree.Call):
        return f"{name} {_value(statement.value, bound)}"
    pairs = _pairs(statement.value, bound, True)
    line = f"{name} {{{', '.join(pairs)}}}"
    if len(line) <= WIDTH:
        return line
    pad = " " * (len(lead) + 2)
    return "\n".join((name, *(pad + pair for pair in pairs)))


def _exports(exports: Sequence[tree.Export], bound: frozenset[str]) -> Iterator[str]:
    for export in _joined(exports):
        calls = ", ".join(f"{{{', '.join(_pairs(call, bound, True))}}}" for call in export.calls)
        yield f"  {_word(export.model.text)}: [{calls}]"


def _expect(statement: tree.Expect) -> str:
    sides = []
    for side in (statement.left, statement.right):
        moved = f" {side.sign} {number(side.amount)}" if side.amount else ""
        sides.append(value(side.base) + moved)
    return f"{sides[0]} {statement.op} {sides[1]}"


def _pairs(call: tree.Call, bound: frozenset[str], outer: bool) -> list[str]:
    """`name: values` and the arguments."""
    values = call.values
    if outer and len(values) == 1 and _stands_alone(values[0]):
        first = _value(values[0], bound)
    else:
        first = f"[{', '.join(_value(v, bound) for v in values)}]"
    return [
        f"{call.name.text}: {first}",
        *(f"{_word(e.key.text)}: {_value(e.value, bound)}" for e in call.named),
    ]


def _stands_alone(node: tree.Value) -> bool:
    """Whether the only value of a call needs no list around it: a plain one, or the models of a merge."""
    if isinstance(node, tree.List):
        return len(node.items) > 1 and all(isinstance(item, tree.Name) for item in node.items)
    return not isinstance(node, tree.Name | tree.Call | tree.Table)


def _value(node: tree.Value, bound: frozenset[str]) -> str:
    match node:
        case tree.Name(text=text):
            dollar = node.sigil or (node.sigil is None and text.partition(".")[0] in bound)
            return f"${text}" if dollar else text
        case tree.Text(value=inner):
            return _string(inner)
        case tree.Constant(value=None):
            return "none"
        case tree.List(items=items):
            return f"[{', '.join(_value(item, bound) for item in items)}]"
        case tree.Table(entries=entries):
            return _table(entries, bound)
        case tree.Call():
            return f"{{{', '.join(_pairs(node, bound, False))}}}"
    return value(node)


def _table(entries: Sequence[tree.Entry], bound: frozenset[str]) -> str:
    """A table; one that would read as a call says that it is none."""
    inside = ", ".join(f"{_word(e.key.text)}: {_value(e.value, bound)}" for e in entries)
    called = bool(entries) and isinstance(entries[0].value, tree.List)
    return f"!table {{{inside}}}" if called else f"{{{inside}}}"


def _word(text: str) -> str:
    """A key; quoted where YAML 1.1 readers would take it for something else."""
    return f'"{text}"' if text.lower() in _WORDS else text


def _string(text: str) -> str:
    plain = _PLAIN.match(text) and not NAME.match(text) and not text.endswith(("-", ".", "/"))
    return text if plain else _quoted(text)


def _quoted(text: str) -> str:
    """A double-quoted YAML string; what does not print is escaped."""
    out = []
    for c in text:
        if c in '"\\':
            out.append("\\" + c)
        elif c == "\n":
            out.append("\\n")
        elif c == "\t":
            out.append("\\t")
        else:
            out.append(c if c.isprintable() else f"\\U{ord(c):08X}")
    return f'"{"".join(out)}"'
