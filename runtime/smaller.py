"""A small random copy of a model: the same family, structure and tokenizer, narrow blocks, drawn weights.

What stages changed stays: layers that went, packed and factored weights, adapters, ties. The copy is made
from the model's own structure and not from its config, so an artefact has one as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from effc.compiler.architecture import architecture, read_config
from effc.compiler.blocks import MLP, MoE, Unit
from effc.compiler.blocks.quant_linear import WHOLE, Packed
from effc.compiler.graph_json import from_json, to_json
from effc.compiler.model import Model
from effc.compiler.packing import pack
from effc.compiler.weights import LazyTensor
from effc.specs.diagnostic import EffcError

SLOTS = 4096
"""Numbers of an array that weights share."""

HEADS, HEAD_DIM, HIDDEN = 4, 16, 128
"""Sizes of a small copy; the width is HEADS * HEAD_DIM."""
WIDTH = HEADS * HEAD_DIM
STEP = 32
"""Hidden sizes are multiples of this, so that groups of weights fit."""


def smaller(model: Model) -> Model:
    """A narrow copy of `model` with random weights; a traced model stays as it is."""
    try:
        structure = to_json(model)
    except EffcError:
        return model
    sizes = _Sizes(model)
    table: dict[str, Any] = {}
    made: dict[str, Unit] = {}
    for path in sorted(structure["modules"], key=lambda p: str(p).count(".")):
        above = next((p for p in _above(path) if p in made), None)
        place = made[above].get_submodule(path.removeprefix(above + ".")) if above else None
        table[path] = sizes.narrow(structure["modules"][path], place)
        made[path] = Unit.from_spec(table[path])
    config = sizes.config(model)
    small = from_json(structure | {"modules": table, "config": config})
    small.tokenizer = model.tokenizer
    small.weights = {name: _lazy(small, name, tensor) for name, tensor in small.tensors().items()}
    return small


class _Sizes:
    """Old sizes to new ones. The widest feed-forward block gets HIDDEN, others their share of it."""

    def __init__(self, model: Model) -> None:
        blocks = [block for _, block in model.units()]
        self.width = getattr(model.module("embedding"), "width", None)
        self.hidden = max((b.hidden for b in blocks if isinstance(b, MLP | MoE)), default=HIDDEN)
        self.grouped = any(getattr(b, "kv_heads", None) not in (None, getattr(b, "heads", 0)) for b in blocks)

    def narrow(self, spec: Mapping[str, Any], place: Any) -> dict[str, Any]:
        """The spec with small sizes. `place`: the unit in whose place it stands inside a block, if any."""
        new = dict(spec)
        for side in ("width", "in_features", "out_features"):
            if side in new:
                there = getattr(place, side, None)
                new[side] = there if there is not None else WIDTH if new[side] == self.width else new[side]
        if self.width and math.isclose(new.get("scale") or 0.0, math.sqrt(self.width)):  # as gemma embeds
            new["scale"] = math.sqrt(WIDTH)
        if "key_dim" in new:
            share = HEAD_DIM * new["heads"] / spec["width"]
            sides = {side: max(4, round(new[side] * share)) for side in ("key_dim", "value_dim")}
            new |= {"heads": HEADS} | sides
        elif "heads" in new:
            grouped = new["kv_heads"] != new["heads"]
            new |= {"heads": HEADS, "kv_heads": HEADS // 2 if grouped else HEADS, "head_dim": HEAD_DIM}
            new["rope"] = _rope(new.get("rope"))
            if new.get("slots"):
                new["slots"] = math.gcd(new["slots"], HEAD_DIM)
            if new.get("fast_heads"):
                new["fast_heads"] = math.gcd(new["fast_heads"], HEADS)
        if "hidden" in new:
            share = HIDDEN * new["hidden"] / self.hidden
            new["hidden"] = max(STEP, STEP * round(share / STEP))
        if "rank" in new:
            most, before = (min(s["in_features"], s["out_features"]) for s in (new, spec))
            new["rank"] = max(1, min(most, round(new["rank"] * most / before)))
        if spec["type"] == "HashedLinear":  # all begin at the front of one array
            new |= {"slots": SLOTS, "fold": 0, "offset": 0, "mapping": "random_fold"}
        for runs, side in (("down", "out_features"), ("across", "in_features")):
            if runs in new and side in new:
                whole = new[runs] == spec[side]
                new[runs] = new[side] if whole else math.gcd(new[runs], new[side])
        if "group" in new and new["group"] != WHOLE:
            before, inputs = (int(s.get("in_features") or s["width"]) for s in (spec, new))
            new["group"] = inputs if new["group"] == before else math.gcd(new["group"], inputs)
        return new

    def config(self, model: Model) -> dict[str, Any]:
        """The config with the sizes of the copy, where the family of the model says how they are written."""
        config: dict[str, Any] = dict(model.config)
        if not model.architecture or not config:
            return config
        family = architecture(model.architecture)
        known = read_config(family, config)
        sizes = {"width": WIDTH, "heads": HEADS, "head_dim": HEAD_DIM, "hidden": HIDDEN}
        sizes["kv_heads"] = HEADS // 2 if self.grouped else HEADS
        for word, size in sizes.items():
            if (key := family.writes.get(word)) and word in known:
                config[key] = size
        for key in ("rope_scaling", "rope_parameters"):
            if isinstance(config.get(key), Mapping):
                config[key] = _rope(config[key])
        return config


def _rope(rope: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Factors for each frequency, as many as a narrow head has."""
    if rope is None:
        return None
    rotated = int(HEAD_DIM * float(rope.get("partial_rotary_factor", 1.0)))
    return {k: list(v)[: rotated // 2] if isinstance(v, list | tuple) else v for k, v in rope.items()}


def _above(path: str) -> list[str]:
    """The paths that a path lies below, the nearest first."""
    words = path.split(".")
    return [".".join(words[:n]) for n in range(len(words) - 1, 0, -1)]


def _lazy(model: Model, name: str, tensor: Tensor) -> LazyTensor:
    shape, dtype = tuple(tensor.shape), tensor.dtype
    path, _, slot = name.rpartition(".")
    unit = model.module(path)
    if isinstance(unit, Packed) and slot in ("packed", "scales", "zeros"):
        return LazyTensor(shape, dtype, partial(_packed, name, shape, dtype, unit.bits, unit.in_features))
    if isinstance(unit, Unit) and unit.drawn(slot, _dice(name)) is not None:
        return LazyTensor(shape, dtype, partial(_suited, unit, slot, name))
    return LazyTensor(shape, dtype, partial(_drawn, name, shape, dtype))


def _suited(unit: Unit, slot: str, name: str) -> Tensor:
    """Values that the unit itself draws."""
    drawn = unit.drawn(slot, _dice(name))
    assert drawn is not None
    return drawn


def _dice(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(sha256(name.encode()).digest()[:8], "little") >> 1)


def _drawn(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Values that keep activations of order one."""
    random = _dice(name)
    if len(shape) == 1:
        return (torch.randn(shape, generator=random) * 0.1 + (not name.endswith(".bias"))).to(dtype)
    return (torch.randn(shape, generator=random) / math.sqrt(shape[-1])).to(dtype)


def _packed(name: str, shape: tuple[int, ...], dtype: torch.dtype, bits: int, inputs: int) -> Tensor:
    """The same of packed weights: any codes, zero points in the middle, scales to match."""
    if name.endswith(".scales"):
        spread = (1 << bits) / math.sqrt(12)  # of codes that are even over 2^bits values
        even: Tensor = torch.rand(shape, generator=_dice(name)) * 0.2 + 0.9
        return (even / (spread * math.sqrt(inputs))).to(dtype)
    if name.endswith(".zeros"):
        middle = torch.full((1, 8 * shape[0] // bits), 1 << (bits - 1), dtype=torch.uint8)
        filled = torch.nn.functional.pad(pack(middle, bits).flatten(), (0, shape[0]))
        return filled[: shape[0]].clone()
    return torch.randint(0, 256, shape, generator=_dice(name), dtype=torch.uint8)
