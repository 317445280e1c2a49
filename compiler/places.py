"""Places: where each canonical tensor of a model lies on disk, by the names of its family."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from effc.compiler.architecture import Architecture, read_config, resolve
from effc.compiler.model import Model
from effc.compiler.roles import layer_of


@dataclass(frozen=True, slots=True)
class Place:
    """Where a canonical tensor lies on disk: a name, and how it sits there."""

    name: str
    transpose: bool = False
    part: int = 0
    parts: tuple[str, ...] = ()
    head_dim: int = 0
    """Where above 0: the parts alternate head by head, this many rows each."""
    experts: int = 0
    shape: tuple[int, ...] = ()
    """Where given: the shape on disk; the numbers follow each other as in the canonical tensor."""


def places(family: Architecture, model: Model) -> dict[str, Place]:
    """Canonical tensor name -> where it lies on disk, for a model without units that a stage made."""
    fused = {part: (f, n) for f in family.fused for n, part in enumerate(f.parts)}
    values = read_config(family, model.config) if family.shaped else {}
    found: dict[str, Place] = {}
    for name, tensor in model.tensors().items():
        module, _, leaf = name.rpartition(".")
        layer = layer_of(module)
        pattern = module if layer is None else module.replace(f"layers.{layer}.", "layers.{i}.", 1)

        bare = pattern in family.bare

        def named(text: str, layer: int | None = layer, leaf: str = leaf, bare: bool = bare) -> str:
            stored = text.replace("{i}", str(layer))
            return stored if bare else f"{stored}.{leaf}"

        if pattern in fused:
            group, index = fused[pattern]
            parts = tuple(named(p) for p in group.parts)
            turned = group.transpose and tensor.dim() == 2
            width = _head_dim(model, module) if group.per_head else 0
            found[name] = Place(named(group.name), turned, index, parts, width)
        elif pattern in family.stacked:
            found[name] = Place(named(family.stacked[pattern]), experts=tensor.shape[0])
        elif pattern in family.tensors:
            turned = pattern in family.transposed and tensor.dim() == 2
            laid = _laid(family.shaped.get(pattern, ()), values, tensor) if leaf == "weight" else ()
            found[name] = Place(named(family.tensors[pattern]), turned, shape=laid)
        else:
            raise KeyError(f"{family.name}.yaml has no place for {pattern}")
    return found


def _laid(shape: Sequence[Any], values: Mapping[str, Any], tensor: Tensor) -> tuple[int, ...]:
    """A shape on disk as numbers; -1 stands for what is left."""
    sizes = [int(resolve(n, values)) for n in shape]
    known = math.prod(n for n in sizes if n > 0)
    return tuple(n if n > 0 else tensor.numel() // known for n in sizes)


def _head_dim(model: Model, module: str) -> int:
    attention = model.module(module.rpartition(".")[0])
    return int(attention.head_dim)  # type: ignore[arg-type]


def place_of(family: Architecture, name: str) -> str:
    """The name on disk of a tensor outside the layers."""
    module, _, leaf = name.rpartition(".")
    return f"{family.tensors.get(module, module)}.{leaf}"


def stored_shape(place: Place, name: str, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The shape on disk of what holds a canonical tensor."""
    shape = tuple(tensors[name].shape)
    if place.experts:
        return shape[1:]
    if place.shape:
        return place.shape
    if place.parts:
        shape = (sum(tensors[p].shape[0] for p in place.parts), *shape[1:])
    return shape[::-1] if place.transpose else shape


def fused_groups(found: Mapping[str, Place]) -> Iterator[tuple[str, list[str]]]:
    """Names on disk with the canonical tensors that make them up, in order."""
    groups: dict[str, list[str]] = {}
    for name, place in found.items():
        groups.setdefault(place.name, []).append(name)
    for stored, parts in groups.items():
        yield stored, sorted(parts, key=lambda n: found[n].part)
