"""Values of the YAML twin: nodes to values, calls and words of the syntax tree.

Scalars follow YAML 1.2: `no` is a word, `010` no number, `1e-4` one. `$name` means a binding. A call is a
mapping whose first key is its name: {prune.depth: [$base], keep: 75%}.
"""

from __future__ import annotations

import re

from effc.dsl import build, tree
from effc.dsl.yaml_nodes import Mapping_, Node, Scalar, Sequence_, shape
from effc.specs.diagnostic import EffcError

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*\Z")
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)(?P<rest>(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][+-]?[0-9]+)?"
    r"(?:[ \t]*%|[ \t]*(?:[kKMGBT][ \t]+)?[A-Za-z]+)?)\Z"
)
_PATTERN = re.compile(r"[0-9]+:[0-9]+\Z")
_CONSTANTS = {"true": True, "false": False, "none": None, "null": None, "~": None, "": None}


def read_value(node: Node) -> tree.Value:
    match node:
        case Scalar():
            return _scalar(node)
        case Sequence_():
            return tree.List(tuple(read_value(item) for item in node.items), node.span)
        case Mapping_() if node.items and isinstance(node.items[0][1], Sequence_) and not node.table:
            return read_call(node, False)
    entries = tuple(tree.Entry(word(k, "a name"), read_value(v)) for k, v in node.items)
    return tree.Table(entries, node.span)


def _scalar(node: Scalar) -> tree.Value:
    value = node.value
    if not node.plain:
        return tree.Text(value, node.span)
    if value in _CONSTANTS:
        return tree.Constant(_CONSTANTS[value], node.span)
    if value.startswith("$"):
        if not NAME.match(value[1:]):
            raise EffcError(
                shape(node.span, f"`{value[:40]}` names no binding", "write $name, or quote the string")
            )
        return tree.Name(value[1:], node.span, True)
    if found := _NUMBER.match(value):
        return build.number(found["sign"].replace("+", ""), found["rest"], node.span)
    if _PATTERN.match(value):
        return tree.Pattern(value, node.span)
    if NAME.match(value):
        return tree.Name(value, node.span, False)
    return tree.Text(value, node.span)


def read_call(node: Node, outer: bool) -> tree.Call:
    """{name: values, key: value}; outside, the first value may also be a single one."""
    if not isinstance(node, Mapping_) or not node.items:
        raise EffcError(shape(node.span, "a call is a mapping", "write {prune.depth: [$base], keep: 75%}"))
    (name, first), *rest = node.items
    if isinstance(first, Sequence_):
        values = tuple(read_value(item) for item in first.items)
        if outer and len(values) > 1 and all(isinstance(value, tree.Name) for value in values):
            values = (tree.List(values, first.span),)  # merge.linear: [$a, $b] takes a list of models
    elif isinstance(first, Mapping_) and first.items and not first.table:
        inner = ", ".join(f"{k.value}: ..." for k, _ in first.items[:4] if k.value != "model")
        help_ = f"write {{{name.value}: [{'$MODEL' if outer else ''}], {inner}}}"
        raise EffcError(shape(first.span, "arguments stand beside the name of a call, not under it", help_))
    elif isinstance(first, Scalar) and first.plain and first.value in ("", "~", "null"):
        values = ()
    else:
        values = (read_value(first),)
    named = tuple(tree.Entry(word(k, "an argument"), read_value(v)) for k, v in rest)
    return tree.Call(_path(name), values, named, node.span)


def mapping(node: Node, what: str, example: str) -> list[tuple[Scalar, Node]]:
    if not isinstance(node, Mapping_):
        raise EffcError(shape(node.span, f"{what} is a mapping", f"write {example}"))
    return node.items


def word(node: Node, what: str) -> tree.Word:
    if isinstance(node, Scalar) and NAME.match(node.value) and "." not in node.value:
        return tree.Word(node.value, node.span)
    raise EffcError(shape(node.span, f"{what} is one word of letters, digits and _"))


def _path(node: Scalar) -> tree.Word:
    if NAME.match(node.value):
        return tree.Word(node.value, node.span)
    raise EffcError(shape(node.span, f"`{node.value[:40]}` names no method, part or source"))


def string(node: Node, what: str) -> tree.Text:
    if isinstance(node, Scalar):
        return tree.Text(node.value, node.span)
    raise EffcError(shape(node.span, f"{what} is a string"))
