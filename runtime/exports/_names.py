"""Names on disk of the modules of a model, whatever a stage put in their place."""

from __future__ import annotations

from dataclasses import dataclass

from effc.compiler.architecture import architecture
from effc.compiler.model import Model
from effc.compiler.roles import layer_of


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a module lies on disk: alone, or as one of several that share a matrix."""

    name: str
    parts: tuple[str, ...] = ()
    """Canonical paths of all that share the matrix, in the order of their rows; empty when alone."""
    per_head: bool = False
    """Whether the parts alternate head by head."""


def spots(model: Model) -> dict[str, Spot]:
    """Canonical module path -> its place, for every module with a role that its family has a name for."""
    family = architecture(model.architecture)
    fused = {part: group for group in family.fused for part in group.parts}
    found: dict[str, Spot] = {}
    for path in model.roles:
        layer = layer_of(path)
        pattern = path if layer is None else path.replace(f"layers.{layer}.", "layers.{i}.", 1)

        def named(text: str, layer: int | None = layer) -> str:
            return text.replace("{i}", str(layer))

        if pattern in fused:
            group = fused[pattern]
            found[path] = Spot(named(group.name), tuple(named(p) for p in group.parts), group.per_head)
        elif pattern in family.tensors:
            found[path] = Spot(named(family.tensors[pattern]))
    return found
