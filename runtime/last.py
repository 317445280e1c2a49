"""Results that only exports use: under which names an export of theirs writes the weights."""

from __future__ import annotations

from collections.abc import Mapping

from effc.compiler.model import Model
from effc.runtime.bind import spec_of
from effc.specs.recipe import Recipe


def bundled(recipe: Recipe, name: str, model: Model) -> Mapping[str, str] | None:
    """Name in the file -> tensor, for the first export of this model that holds every weight as it is.

    None where a later binding takes the model, since then it shares tensors with that one's result, and where
    no export of it holds the weights unchanged.
    """
    stages = [binding for binding in recipe.bindings if binding.value != "report"]
    if any(ref.name == name for binding in stages for ref in recipe.inputs_of(binding)):
        return None
    for export in recipe.exports:
        if export.model == name and (names := spec_of("export", export.call).names(model)):
            found: Mapping[str, str] = names
            return found
    return None
