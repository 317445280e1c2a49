"""A checked recipe as text again: constants put in, used files joined, numbers in base units.

`read(text_of(recipe))` is the recipe again, but for names with dots and params, which are gone. An artefact
keeps this text, because it needs no other file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import count
from typing import Literal, TypeGuard

from effc.dsl import tree
from effc.dsl.unparse import unparse
from effc.specs.catalogue import Catalogue
from effc.specs.quantity import DIMENSIONS
from effc.specs.recipe import Binding, Call, Expect, Metric, Recipe, Ref, Side, Value
from effc.specs.source import Source, Span

_NOWHERE = Span(Source("", ""), 0, 0)


def text_of(recipe: Recipe, catalogue: Catalogue) -> str:
    """The recipe in canonical text, complete in itself; the catalogue tells words from strings."""
    return unparse(document_of(recipe, catalogue))


def document_of(recipe: Recipe, catalogue: Catalogue) -> tree.Document:
    recipe = renamed(recipe, flat_names(recipe))
    head: list[tree.Statement] = [tree.Version(_number(recipe.version), _NOWHERE)]
    title = tree.Text(recipe.title, _NOWHERE) if recipe.title else None
    head.append(tree.Title(_word(recipe.name), title, _NOWHERE))
    bindings = [_binding(b, catalogue) for b in recipe.bindings]
    expects = [_expect(e) for e in recipe.expects]
    exports = [tree.Export(_word(e.model), (_call(e.call, 1, catalogue),), _NOWHERE) for e in recipe.exports]
    return tree.Document((*head, *bindings, *expects, *exports), _NOWHERE.source)


def call_of(call: Call, catalogue: Catalogue) -> tree.Call:
    """A call as it would be written, every argument with its name."""
    return _call(call, 0, catalogue)


def flat_names(recipe: Recipe) -> dict[str, str]:
    """`c.base`, from a used file, becomes `c_base`, or `c_base_2` where that is bound already."""
    names = [binding.name for binding in recipe.bindings]
    taken = {name for name in names if "." not in name}
    found: dict[str, str] = {name: name for name in taken}
    for name in names:
        if name not in found:
            plain = name.replace(".", "_")
            tries = (plain if n == 1 else f"{plain}_{n}" for n in count(1))
            found[name] = next(new for new in tries if new not in taken)
            taken.add(found[name])
    return found


def renamed(recipe: Recipe, names: Mapping[str, str]) -> Recipe:
    """The same recipe with other names of bindings."""

    def value(old: Value) -> Value:
        match old:
            case Ref():
                return replace(old, name=names[old.name])
            case Call():
                return call(old)
            case tuple():
                return tuple(value(item) for item in old)
            case Mapping():
                return {key: value(item) for key, item in old.items()}
        return old

    def call(old: Call) -> Call:
        models = tuple(replace(ref, name=names[ref.name]) for ref in old.models)
        return replace(old, models=models, arguments={k: value(v) for k, v in old.arguments.items()})

    def side(old: Side) -> Side:
        if not isinstance(old.base, Metric):
            return old
        data = old.base.data and replace(old.base.data, name=names[old.base.data.name])
        return replace(old, base=replace(old.base, model=names[old.base.model], data=data))

    return replace(
        recipe,
        bindings=tuple(replace(b, name=names[b.name], call=call(b.call)) for b in recipe.bindings),
        expects=tuple(replace(e, left=side(e.left), right=side(e.right)) for e in recipe.expects),
        exports=tuple(replace(e, model=names[e.model], call=call(e.call)) for e in recipe.exports),
    )


def _word(text: str) -> tree.Word:
    return tree.Word(text, _NOWHERE)


def _binding(binding: Binding, catalogue: Catalogue) -> tree.Bind:
    call = _call(binding.call, 0 if binding.keyword == "stage" else 1, catalogue)
    return tree.Bind(binding.keyword, _word(binding.name), call, _NOWHERE)


def _call(call: Call, bare: int, catalogue: Catalogue) -> tree.Call:
    """A call; the first `bare` arguments that name a place stand without their name."""
    entry = catalogue.find(call.kind)

    def written(key: str, value: Value) -> tree.Value:
        known = entry.parameter(key) if entry else None
        if known and isinstance(value, str) and any(value in form.choices for form in known.forms):
            if value == "none":
                return tree.Constant(None, _NOWHERE)
            return tree.Name(value, _NOWHERE) if value.isidentifier() else _value(value)
        if isinstance(value, tuple):
            return tree.List(tuple(written(key, item) for item in value), _NOWHERE)
        if isinstance(value, Mapping):
            entries = tuple(tree.Entry(tree.Word(k, _NOWHERE), written(k, v)) for k, v in value.items())
            return tree.Table(entries, _NOWHERE)
        return _call(value, 0, catalogue) if _is_part(value) else _value(value)

    models = tuple(_value(ref) for ref in call.models)
    listed = len(models) > 1 or call.kind.startswith("merge.")
    values: tuple[tree.Value, ...] = (tree.List(models, _NOWHERE),) if listed and models else models
    given = dict(call.arguments)
    if bare and not models:
        first = next((key for key in ("path", "name") if key in given), None)
        if first:
            values = (written(first, given.pop(first)),)
    named = tuple(tree.Entry(tree.Word(key, _NOWHERE), written(key, value)) for key, value in given.items())
    name = call.kind.rpartition(".")[2] if call.kind.count(".") > 1 else call.kind
    return tree.Call(tree.Word(name, _NOWHERE), values, named, _NOWHERE)


def _value(value: Value) -> tree.Value:
    match value:
        case None | bool():
            return tree.Constant(value, _NOWHERE)
        case int() | float():
            return _number(value)
        case str():
            return tree.Pattern(value, _NOWHERE) if _is_pattern(value) else tree.Text(value, _NOWHERE)
        case tuple():
            return tree.List(tuple(_value(item) for item in value), _NOWHERE)
        case Ref():
            return tree.Name(value.name + (f".{value.split}" if value.split else ""), _NOWHERE)
        case Call(kind="depth"):
            ends = tuple(_value(value.arguments[key]) for key in ("first", "last"))
            return tree.Call(tree.Word("depth", _NOWHERE), ends, (), _NOWHERE)
    raise TypeError(f"a recipe holds no {type(value).__name__}")


def _is_part(value: Value) -> TypeGuard[Call]:
    return isinstance(value, Call) and value.kind != "depth"


def _number(value: float) -> tree.Number:
    return tree.Number(repr(value), None, _NOWHERE)


def _is_pattern(text: str) -> bool:
    left, colon, right = text.partition(":")
    return bool(colon) and left.isdigit() and right.isdigit()


def _expect(item: Expect) -> tree.Expect:
    return tree.Expect(_side(item.left), item.op, _side(item.right), _NOWHERE)


def _side(side: Side) -> tree.Side:
    base = _metric(side.base) if isinstance(side.base, Metric) else _number(side.base)
    if not side.change:
        return tree.Side(base, None, None, _NOWHERE)
    sign: Literal["+", "-"] = "-" if side.change < 0 else "+"
    size = abs(side.change) * (100 if side.relative else 1)
    unit = "%" if side.relative else _unit_of(side)
    return tree.Side(base, sign, tree.Number(repr(float(size)), unit, _NOWHERE), _NOWHERE)


def _unit_of(side: Side) -> str | None:
    """The base unit of an amount that may not stand without one."""
    from effc.specs.metrics import MEASURES

    dimension = MEASURES[side.base.metric].dimension if isinstance(side.base, Metric) else ""
    return next(
        (u for u, factor in DIMENSIONS.get(dimension, {}).items() if factor == 1 and len(u) <= 2), None
    )


def _metric(metric: Metric) -> tree.Name | tree.Call:
    word = f"{metric.model}.{metric.metric}"
    inside = ([_value(metric.data)] if metric.data else []) + [_value(a) for a in metric.arguments]
    if not inside:
        return tree.Name(word, _NOWHERE)
    return tree.Call(tree.Word(word, _NOWHERE), tuple(inside), (), _NOWHERE)
