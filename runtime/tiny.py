"""`--tiny`: the same recipe, every stage of it, on small random copies of its models, in seconds.

Depth stays, since selectors name layers; widths, steps, samples and data shrink. Exports go below the store,
so that a trial never overwrites a real result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from effc.runtime.data._packed import pack
from effc.runtime.data._source import Document, Sequences
from effc.runtime.data._vocabulary import Vocabulary
from effc.specs.recipe import Binding, Call, Export, Recipe, Value

LIMITS: Mapping[str, int] = {
    "steps": 4,
    "samples": 4,
    "batch": 2,
    "accumulate": 2,
    "seq": 32,
    "group": 32,
    "rank": 4,
    "router_steps": 1,
    "expert_steps": 1,
}
"""Greatest value of an argument of this name, wherever it stands."""

DOCUMENTS = 12
"""Documents of a split that are read, each cut to LENGTH characters."""
LENGTH = 2000


def shrink(recipe: Recipe, store: Path) -> Recipe:
    """The recipe with small arguments; its exports go to `store/tiny`."""
    return replace(
        recipe,
        bindings=tuple(_binding(b) for b in recipe.bindings),
        exports=tuple(_export(e, store / "tiny") for e in recipe.exports),
    )


def open_data(source: Any, files: Mapping[str, bytes], store: Path) -> Any:
    """A source of sequences with few documents; any other as it is."""
    if not isinstance(source, Sequences):
        return source.open(files, store)
    vocabulary = Vocabulary.of(files)
    documents = few(source.documents(vocabulary))
    return pack(documents, vocabulary, source.seq, source.heldout, source.seed, None, ())


def few(documents: Sequence[Document]) -> list[Document]:
    """The first documents of every split; those with marked spans stay whole."""
    kept: dict[str | None, list[Document]] = {}
    for document in documents:
        group = kept.setdefault(document.split, [])
        if len(group) < DOCUMENTS:
            group.append(document if document.spans else replace(document, text=document.text[:LENGTH]))
    return [document for group in kept.values() for document in group]


def _binding(binding: Binding) -> Binding:
    return replace(binding, call=_call(binding.call))


def _call(call: Call) -> Call:
    return replace(call, arguments={name: _value(name, v) for name, v in call.arguments.items()})


def _value(name: str, value: Value) -> Value:
    match value:
        case Call():
            return _call(value)
        case tuple():
            return tuple(_value(name, item) for item in value)
        case Mapping():
            return {inner: _value(inner, item) for inner, item in value.items()}
        case int() if not isinstance(value, bool) and name in LIMITS:
            return min(value, LIMITS[name])
    return value


def _export(export: Export, folder: Path) -> Export:
    path = export.call.arguments.get("path")
    if not isinstance(path, str):
        return export
    place = folder / Path(path).name
    return replace(export, call=replace(export.call, arguments={**export.call.arguments, "path": str(place)}))
