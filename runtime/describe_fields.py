"""From a spec class to its catalogue entry: fields with types, units and limits, and what it states."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from inspect import cleandoc
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as at
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from effc.compiler.method import Method, Part, Slot, Takes
from effc.compiler.selects import Selects
from effc.specs.base import Spec
from effc.specs.catalogue import Entry, EntryRole, Form, Parameter
from effc.specs.recipe import Ref
from effc.specs.select import Rule
from effc.specs.units import Gradient, Unit

_SELECTORS = ("select", "except")


def entry(cls: type[Spec], kind: str, role: EntryRole, closure: str, value: str) -> Entry:
    """The entry of one class. Raises TypeError when a field has a type that recipes cannot write."""
    doc = cleandoc(cls.__doc__ or "")
    return Entry(
        kind=kind,
        role=role,
        summary=" ".join(doc.partition("\n\n")[0].split()),
        family=kind.rpartition(".")[0] or role,
        slot=kind.rpartition(".")[0] if role == "part" else None,
        doc=doc,
        paper=str(getattr(cls, "paper", "folklore")),
        parameters=tuple(_parameter(cls, name, info) for name, info in cls.model_fields.items()),
        examples=tuple(getattr(cls, "examples", ())),
        value=value,
        overrides=tuple(getattr(cls, "overrides", ())),
        closure=closure,
        judges=_judges(cls),
        **(_contract(cls) if issubclass(cls, Method) else {}),
    )


def _judges(cls: type[Spec]) -> bool:
    rules = cls.__pydantic_decorators__
    return bool(rules.model_validators or rules.field_validators)


def _contract(cls: type[Method]) -> dict[str, Any]:
    contract = cls.contract
    facts = {key: tuple(map(str, getattr(contract, key))) for key in ("needs", "gives", "breaks", "keeps")}
    return {"contract": str(contract.fidelity), "models": cls.models, **facts}


def _parameter(cls: type[Spec], field: str, info: FieldInfo) -> Parameter:
    name = info.alias or field
    selectors = name in _SELECTORS and issubclass(cls, Selects)
    forms = tuple(_forms(info.annotation, list(info.metadata)))
    if not forms:
        raise TypeError(f"the field `{field}` of {cls.__name__} has a type that recipes cannot write")
    if selectors:
        forms = (Form("list", item=(Form("selector"),)),)
    if any(form.type == "gradient" for form in forms):
        forms = tuple(_sloped(form) for form in forms if form.type != "gradient")
    default = None if info.is_required() else _plain(info.get_default(call_default_factory=True))
    slot = next((form.slot for form in forms if form.slot), None)
    if slot and default is None:
        default = next((m.default for m in info.metadata if isinstance(m, Slot)), None)
    return Parameter(name, forms, info.description or "", info.is_required(), default)


def _sloped(form: Form) -> Form:
    kept = {key: getattr(form, key) for key in Form.__slots__}
    return Form(**{**kept, "gradient": form.type in ("int", "float")})


def _forms(annotation: Any, metadata: list[Any]) -> Iterable[Form]:
    """The alternatives that an annotation allows; limits outside a union hold for each alternative."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        yield from _forms(inner, [*more, *metadata])
    elif origin in (Union, types.UnionType):
        for alternative in get_args(annotation):
            yield from _forms(alternative, metadata)
    elif origin is Literal:
        choices = get_args(annotation)
        if all(isinstance(choice, str) for choice in choices):
            pattern = all(_is_pattern(choice) for choice in choices)
            yield Form("pattern" if pattern else "word", choices=choices)
        else:
            yield Form("int", choices=choices)
    elif origin in (tuple, list):
        yield _list(get_args(annotation), metadata)
    elif origin in (dict, Mapping) or annotation in (dict, Mapping):
        yield Form("table")
    elif isinstance(annotation, type):
        yield from _named(annotation, metadata)


def _list(inside: tuple[Any, ...], metadata: list[Any]) -> Form:
    fixed = len(inside) > 1 and inside[-1] is not Ellipsis
    if inside and inside[0] is Rule:
        return Form("rules")
    items = {form: None for kind in inside if kind is not Ellipsis for form in _forms(kind, [])}
    length = (len(inside), len(inside)) if fixed else _length(metadata)
    return Form("list", item=tuple(items), length=length)


def _named(annotation: type, metadata: list[Any]) -> Iterable[Form]:
    takes = next((m for m in metadata if isinstance(m, Takes)), None)
    slot = next((m for m in metadata if isinstance(m, Slot)), None)
    if annotation is type(None):
        yield Form("none")
    elif annotation is Gradient:
        yield Form("gradient")
    elif issubclass(annotation, Ref):
        yield Form(takes.value if takes else "model")
    elif issubclass(annotation, Part):
        yield Form("part", slot=slot.folder if slot else None)
    elif annotation is bool:
        yield Form("bool")
    elif annotation in (int, float):
        yield _number(annotation.__name__, metadata)
    elif annotation is str:
        yield Form("str", length=_length(metadata))


def _number(type_: str, metadata: list[Any]) -> Form:
    unit = next((m.dimension for m in metadata if isinstance(m, Unit)), None)
    least, low_open = _bound(metadata, at.Ge, at.Gt, "ge", "gt", max)
    greatest, high_open = _bound(metadata, at.Le, at.Lt, "le", "lt", min)
    return Form(type_, unit, least, greatest, (low_open, high_open))


def _bound(
    metadata: list[Any], closed: type, open_: type, closed_name: str, open_name: str, strictest: Any
) -> tuple[float | None, bool]:
    """The strictest of several limits, and whether it is itself left out."""
    limits = [(getattr(m, closed_name), False) for m in metadata if isinstance(m, closed)]
    limits += [(getattr(m, open_name), True) for m in metadata if isinstance(m, open_)]
    if not limits:
        return None, False
    value = strictest(limit for limit, _ in limits)
    return value, any(is_open for limit, is_open in limits if limit == value)


def _length(metadata: list[Any]) -> tuple[int | None, int | None]:
    fewest = [m.min_length for m in metadata if isinstance(m, at.MinLen)]
    most = [m.max_length for m in metadata if isinstance(m, at.MaxLen)]
    return max(fewest, default=None), min(most, default=None)


def _is_pattern(text: str) -> bool:
    left, colon, right = text.partition(":")
    return bool(colon) and left.isdigit() and right.isdigit()


def _plain(value: Any) -> Any:
    """A default as JSON holds it."""
    if value is PydanticUndefined:
        return None
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
