"""JSON schema of the YAML form of recipes, for completion and checking in editors."""

from __future__ import annotations

from typing import Any

from effc.specs.catalogue import Catalogue, Entry, EntryRole, Form

_NAME = {"type": "string", "pattern": r"^\$?[A-Za-z_][A-Za-z0-9_.]*$"}
_BINDING = {"type": "string", "pattern": r"^\$[A-Za-z_][A-Za-z0-9_.]*$"}


def recipe_schema(catalogue: Catalogue) -> dict[str, Any]:
    """The whole file."""

    def one_of(role: EntryRole) -> dict[str, Any]:
        return {"oneOf": [call_schema(e, catalogue) for e in catalogue.of_role(role)]}

    stage = {
        "type": "object",
        "minProperties": 1,
        "maxProperties": 1,
        "additionalProperties": one_of("method"),
    }
    exports = {"anyOf": [one_of("export"), {"type": "array", "items": one_of("export")}]}
    named = {"type": "object", "additionalProperties": True}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "effc recipe",
        "type": "object",
        "required": ["effc"],
        "additionalProperties": False,
        "properties": {
            "effc": {"const": 1, "description": "version of the language"},
            "recipe": {"anyOf": [_NAME, {"type": "object", "required": ["name"]}]},
            "use": {"type": "object", "additionalProperties": {"type": "string"}},
            "params": {**named, "description": "constants that the command line may set with -p"},
            "let": {**named, "description": "constants"},
            "models": {"type": "object", "additionalProperties": one_of("model")},
            "data": {"type": "object", "additionalProperties": one_of("data")},
            "stages": {"type": "array", "items": stage},
            "expects": {"type": "array", "items": {"type": "string"}},
            "exports": {
                "type": "object",
                "additionalProperties": exports,
            },
        },
    }


def call_schema(entry: Entry, catalogue: Catalogue) -> dict[str, Any]:
    """One call: the name with its values, and the arguments."""
    name = entry.short if entry.role == "part" else entry.kind
    arguments = {p.name: _parameter(p.forms, catalogue, p.description, p.default) for p in entry.parameters}
    required = [p.name for p in entry.parameters if p.required] if entry.role in ("method", "part") else []
    return {
        "type": "object",
        "description": entry.summary,
        "properties": {name: {"description": "values without a name; a method's models"}, **arguments},
        "required": [name, *required],
        "additionalProperties": False,
    }


def _parameter(
    forms: tuple[Form, ...], catalogue: Catalogue, description: str, default: Any
) -> dict[str, Any]:
    alternatives = [_form(form, catalogue) for form in forms]
    made: dict[str, Any] = {"anyOf": [*alternatives, _BINDING]}
    if description:
        made["description"] = description
    if default is not None:
        made["default"] = default
    return made


def _form(form: Form, catalogue: Catalogue) -> dict[str, Any]:
    if form.choices:
        return {"enum": list(form.choices)}
    match form.type:
        case "int" | "float":
            return _number(form)
        case "bool":
            return {"type": "boolean"}
        case "none":
            return {"enum": [None, "none"]}
        case "list":
            items = [_form(item, catalogue) for item in form.item]
            return {"type": "array", "items": {"anyOf": items}} if items else {"type": "array"}
        case "rules":
            return {"type": "array", "items": {"type": "object", "required": ["on"]}}
        case "part":
            parts = [call_schema(part, catalogue) for part in catalogue.of_slot(form.slot or "")]
            return {"anyOf": [*parts, {"enum": [p.short for p in catalogue.of_slot(form.slot or "")]}]}
        case "model" | "data":
            return _BINDING
        case "table":
            return {"type": "object"}
    return {"type": "string"}


def _number(form: Form) -> dict[str, Any]:
    """A plain number within its limits, or a quantity with a unit."""
    plain: dict[str, Any] = {"type": "integer" if form.type == "int" else "number"}
    low, high = form.open
    if form.least is not None:
        plain["exclusiveMinimum" if low else "minimum"] = form.least
    if form.greatest is not None:
        plain["exclusiveMaximum" if high else "maximum"] = form.greatest
    if form.unit is None:
        return plain
    return {"anyOf": [plain, {"type": "string", "pattern": r"^[0-9.]+([eE][+-]?[0-9]+)? ?[A-Za-z% ]+$"}]}
