"""What folders of packed and of adapted models share: config, dense tensors, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effc.compiler.architecture import architecture
from effc.compiler.blocks import MLP, LoraLinear, Unit
from effc.compiler.blocks.quant_linear import Packed
from effc.compiler.checkpoint_write import SafetensorsWriter
from effc.compiler.importer import Place, build, fused_groups, places
from effc.compiler.model import Model
from effc.specs.diagnostic import Diagnostic, EffcError


def config_of(model: Model) -> dict[str, Any]:
    """The source's configuration with what stages changed: layers, inner width, ties."""
    family = architecture(model.architecture)
    config = dict(model.config)
    hidden = {unit.hidden for _, unit in model.units() if isinstance(unit, MLP)}
    changed: dict[str, Any] = {"layers": model.layers, "tied": "head.weight" in model.ties()}
    if len(hidden) == 1:
        changed["hidden"] = hidden.pop()
    for word, value in changed.items():
        if (key := family.writes.get(word)) and (word != "tied" or key in config or value):
            config[key] = value
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and len(kinds) > model.layers:
        config["layer_types"] = kinds[: model.layers]
    return config


def twin(model: Model) -> Model:
    """The dense model that the configuration calls for, on meta.

    Raises:
        EffcError: E432 when the configuration makes no model.
    """
    return build(architecture(model.architecture), config_of(model), _dtype(model))


def differences(kind: str, model: Model) -> list[Diagnostic]:
    """Where the model is not what its configuration can say, packed weights and adapters aside."""
    if not model.architecture:
        why = "a model without an architecture has no layout that others read"
        return [cannot(kind, why)]
    try:
        other = twin(model)
    except EffcError as problem:
        return list(problem.diagnostics)
    ours, theirs = (dict(_shapes(m)) for m in (model, other))
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return [
            cannot(kind, f"`{names[0]}`{more}: config.json of {model.architecture} cannot say this shape")
        ]
    return []


def cannot(kind: str, why: str) -> Diagnostic:
    return Diagnostic(
        "E553",
        f"`{kind}` cannot express this model",
        notes=(why,),
        help="artifact holds every model effc can make",
    )


def dense(model: Model, other: Model) -> Iterator[tuple[str, list[str], Place]]:
    """Names on disk of what is stored as plain numbers, with the canonical tensors that make each up."""
    found = places(architecture(model.architecture), other)
    kept = {name: place for name, place in found.items() if not isinstance(_unit(model, name), Packed)}
    for stored, parts in fused_groups(kept):
        yield stored, parts, kept[parts[0]]


def plain(model: Model, parts: list[str], place: Place) -> Iterator[tuple[str, Tensor]]:
    """One tensor on disk from its canonical parts; stacked experts become one tensor each."""
    tensors = [tensor_of(model, name) for name in parts]
    if place.experts:
        yield from ((place.name.replace("{e}", str(e)), tensors[0][e]) for e in range(place.experts))
        return
    whole = tensors[0]
    if place.head_dim:
        whole = torch.stack([t.unflatten(0, (-1, place.head_dim)) for t in tensors], 1).flatten(0, 2)
    elif len(tensors) > 1:
        whole = torch.cat(tensors)
    yield place.name, (whole.t() if place.transpose else whole).contiguous()


def tensor_of(model: Model, name: str) -> Tensor:
    """A dense tensor by its canonical name; beneath an adapter where there is one."""
    path, _, slot = name.rpartition(".")
    unit = _unit(model, name)
    module = unit if isinstance(unit, Unit) else model.module(path)
    tensor: Tensor = getattr(module, slot)
    return tensor.detach()


def write(model: Model, place: Path, config: Mapping[str, Any], packed: Mapping[str, Tensor]) -> None:
    """A new folder with config, weights and what belongs to the tokenizer. The model is materialized."""
    place.mkdir()
    (place / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    files = model.tokenizer.files if model.tokenizer else {}
    for name, content in files.items():
        (place / name).write_bytes(content)
    tensors = dict(packed)
    for _, parts, spot in dense(model, twin(model)):
        tensors.update(plain(model, parts, spot))
    layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with SafetensorsWriter(place / "model.safetensors", layout) as file:
        for name, tensor in tensors.items():
            file.put(name, tensor)


def _unit(model: Model, name: str) -> nn.Module:
    module = model.module(name.rpartition(".")[0])
    return module.base if isinstance(module, LoraLinear) else module


def _shapes(model: Model) -> Iterator[tuple[str, Any]]:
    """Path of every unit -> its arguments, dtype, packing and adapters aside."""
    for path, unit in model.units():
        if ".base" in f".{path}":
            continue
        beneath = unit.base if isinstance(unit, LoraLinear) else unit
        spec = {k: v for k, v in beneath.spec().items() if k not in _ASIDE}
        yield path, {k: v for k, v in spec.items() if k != "type"}


_ASIDE = {"dtype", "bits", "group", "symmetric", "scale_dtype"}


def _dtype(model: Model) -> torch.dtype:
    return next(t.dtype for n, t in model.tensors().items() if t.is_floating_point() and "norm" in n)
