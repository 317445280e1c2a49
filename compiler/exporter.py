"""Export: a model back to the names, layout and config.json of its family; what these cannot say is named.

The config is the source's own with what stages changed. Whether it expresses the result is asked of the
importer: the model that the new config builds must have the same blocks in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from effc.compiler.architecture import architecture
from effc.compiler.blocks import LoraLinear, Unit
from effc.compiler.emitted import emitted, left_behind, main_dtype
from effc.compiler.importer import build
from effc.compiler.kin import written_as
from effc.compiler.model import Model
from effc.compiler.places import Place, fused_groups, places
from effc.compiler.presence import loaded
from effc.compiler.weights import LazyTensor
from effc.specs.diagnostic import EffcError

_STANDS_FOR = {
    "QuantLinear": "Linear",
    "LowRankLinear": "Linear",
    "SparseLowRankLinear": "Linear",
    "HashedLinear": "Linear",
    "PlanesLinear": "Linear",
    "LoraLinear": "Linear",
    "QuantStackedLinear": "StackedLinear",
    "QuantEmbedding": "Embedding",
}
"""Units that a stage made -> the dense unit whose numbers they can give."""
_STORAGE = {"dtype", "bits", "group", "symmetric", "scale_dtype", "rank", "alpha", "scaling", "dropout"}
"""Arguments that say how weights are stored and not what is computed from them."""
_TRAINING = {"balance", "scope", "pooled", "capacity", "jitter"}
"""Arguments that act in training alone."""


def inexpressible(model: Model, dense: bool = False) -> list[str]:
    """Why the family's layout cannot hold the model, in words that name the blocks; empty when it can.

    `dense`: packed and factored weights count as the dense ones that they stand for. Works on a meta model.
    """
    if not model.architecture:
        return ["the model has no architecture that other tools know"]
    try:
        twin = _twin(model)
    except EffcError as problem:
        return [note for d in problem.diagnostics for note in (d.title, *d.notes)][:4]
    found = _packed(model) if not dense else []
    ours, theirs = (list(map(_called, m.gm.graph.nodes)) for m in (model, twin))
    if ours != theirs:
        new = [f"`{name}`" for name in dict.fromkeys(ours) if name not in set(theirs)]
        lost = [f"`{name}`" for name in dict.fromkeys(theirs) if name not in set(ours)]
        words = [f"has {_some(new)} besides"] if new else []
        words += [f"lacks {_some(lost)}"] if lost else []
        return [*found, f"the graph {' and '.join(words) or 'runs its blocks in another order'}"]
    for path, unit in twin.units():
        mine = model.module(path)
        if isinstance(mine, LoraLinear):
            mine = mine.base
        if _standing(mine) != type(unit).__name__:
            found.append(f"`{path}` is {type(mine).__name__}, the family has {type(unit).__name__} there")
        elif isinstance(mine, Unit) and (differing := _differing(mine, unit)):
            found.append(f"`{path}` has {differing}")
    return found if len(found) <= 6 else [*found[:6], f"and {len(found) - 6} more"]


def stored_tensors(model: Model) -> dict[str, LazyTensor]:
    """Names on disk -> tensors, made one at a time from the canonical ones when they are read.

    Packed and factored weights are given dense; tensors that layers share are written for each of them. The
    source's poolers and task heads follow as they were.
    The model must be expressible; its tensors are read as they are needed.
    """
    twin = _twin(model)
    table = places(written_as(model)[0], twin)
    shapes = {name: tuple(t.shape) for name, t in twin.tensors().items()}
    absent = {name for name, tensor in model.tensors().items() if tensor.is_meta and name in model.weights}
    found: dict[str, LazyTensor] = {}
    for name, parts in fused_groups(table):
        place = table[parts[0]]
        dtype = _dtype_of(model, parts[0])
        if place.experts:
            for e in range(place.experts):
                shape = shapes[parts[0]][1:]
                found[name.replace("{e}", str(e))] = LazyTensor(shape, dtype, _expert(model, parts[0], e))
            continue
        shape = (sum(shapes[p][0] for p in parts), *shapes[parts[0]][1:])
        shape = place.shape or (shape[::-1] if place.transpose else shape)
        if parts[0] in absent and _as_it_is(model, parts, place):
            found[name] = model.weights[parts[0]]
        else:
            found[name] = LazyTensor(shape, dtype, _joined(model, parts, place))
    return found if left_behind(model) else {**found, **model.beside}


def stored_names(model: Model) -> dict[str, str] | None:
    """Names on disk -> names of the tensors that lie there as they are, if that can be said of all.

    None where one is joined, turned, computed or written twice, or where tensors travel beside the model.
    The model must be expressible.
    """
    twin = _twin(model)
    table = places(written_as(model)[0], twin)
    groups = dict(fused_groups(table))
    plain = all(_as_it_is(model, parts, table[parts[0]]) for parts in groups.values())
    names = {name: parts[0] for name, parts in groups.items()}
    whole = sorted(names.values()) == sorted(model.tensors())
    return names if plain and whole and not model.beside else None


def _twin(model: Model) -> Model:
    """What the family builds of the config that would be written: to compare with, never to change."""
    return _built(written_as(model)[0].name, json.dumps(emitted(model)), main_dtype(model))


@lru_cache(maxsize=4)
def _built(family: str, config: str, dtype: torch.dtype) -> Model:
    """One that is asked for several times in a run, in a few milliseconds a layer, is built once."""
    return build(architecture(family), json.loads(config), dtype)


def _called(node: torch.fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else f"{node.op} {node.name.partition('_')[0]}"


def _packed(model: Model) -> list[str]:
    kinds: dict[str, list[str]] = {}
    for path, unit in model.units():
        if type(unit).__name__ in _STANDS_FOR:
            kinds.setdefault(type(unit).__name__, []).append(f"`{path}`")
    return [f"{_some(paths)} hold {kind}" for kind, paths in kinds.items()]


def _standing(module: nn.Module) -> str:
    name = type(module).__name__
    return _STANDS_FOR.get(name, name)


def _differing(mine: Unit, other: Unit) -> str:
    """Arguments that differ, in words."""
    ours, theirs = mine.spec(), other.spec()
    keys = [
        k for k in theirs if k not in _STORAGE | _TRAINING | {"type"} and k in ours and ours[k] != theirs[k]
    ]
    return ", ".join(f"{k} {_short(ours[k])} where the config gives {_short(theirs[k])}" for k in keys)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _dtype_of(model: Model, name: str) -> torch.dtype:
    """What a tensor is stored as: its own dtype, the model's where it was packed."""
    path, _, slot = name.rpartition(".")
    tensor = _own(model.module(path), slot)
    return tensor.dtype if tensor is not None else main_dtype(model)


def _own(module: nn.Module, slot: str) -> Tensor | None:
    """A tensor as it lies in its module, beneath an adapter where there is one; None when packed."""
    if isinstance(module, LoraLinear):
        module = module.base
    own = module._parameters.get(slot)
    return own if own is not None else module._buffers.get(slot)


def _dense(model: Model, name: str) -> Tensor:
    """A canonical tensor as plain numbers in the dtype it is stored in.

    Packed and factored weights are computed; an adapter's change is added to what lies beneath.
    """
    path, _, slot = name.rpartition(".")
    module: Any = loaded(model, path)
    dtype = _dtype_of(model, name)
    beneath: Any = module.base if isinstance(module, LoraLinear) else module
    own = _own(module, slot)
    value: Tensor = own.detach() if own is not None else beneath.dense()
    if own is None and hasattr(beneath, "experts"):
        value = value.view(beneath.experts, -1, value.shape[-1])
    if isinstance(module, LoraLinear) and slot == "weight":
        value = value.float() + module.change()
    return value.to(dtype)


def _as_it_is(model: Model, parts: list[str], place: Place) -> bool:
    """Whether the file holds one canonical tensor, unchanged, which its module has in dense form."""
    moved = place.experts or place.transpose or place.head_dim or place.shape
    path, _, slot = parts[0].rpartition(".")
    module = model.module(path)
    own = _own(module, slot) if not isinstance(module, LoraLinear) else None
    return len(parts) == 1 and not moved and own is not None


def _joined(model: Model, parts: list[str], place: Place) -> Callable[[], Tensor]:
    def read() -> Tensor:
        tensors = [_dense(model, name) for name in parts]
        whole = tensors[0]
        if place.head_dim:
            heads = [t.unflatten(0, (-1, place.head_dim)) for t in tensors]
            whole = torch.stack(heads, 1).flatten(0, 2)
        elif len(tensors) > 1:
            whole = torch.cat(tensors)
        whole = (whole.t() if place.transpose else whole).contiguous()
        return whole.view(place.shape) if place.shape else whole

    return read


def _expert(model: Model, name: str, expert: int) -> Callable[[], Tensor]:
    return lambda: _dense(model, name)[expert].contiguous()
