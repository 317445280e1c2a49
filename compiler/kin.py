"""Kin: the family whose layout a model is written in, where its own lacks a block that a stage put in.

A llama whose every feed-forward block became a mixture is a mixtral: same tensors, same arithmetic, one more
kind of block. Which families extend which is data (`extends` in specs/architectures/*.yaml).
"""

from __future__ import annotations

from typing import Any

from effc.compiler.architecture import Architecture, architecture, names, read_config
from effc.compiler.blocks.moe import MoE
from effc.compiler.model import Model


def written_as(model: Model) -> tuple[Architecture, dict[str, Any]]:
    """The family, and the model's config in its words: the source's own wherever that can hold the model.

    Raises:
        EffcError: E430 for a model without a known architecture, E432 when the source's config is not read.
    """
    family = architecture(model.architecture)
    block = next((unit for _, unit in model.units() if isinstance(unit, MoE)), None)
    if block is None or "moe" in family.blocks["layer"]:
        return family, dict(model.config)
    for kin in map(architecture, names()):
        if family.name in kin.extends and "moe" in kin.blocks["layer"]:
            sizes = {"experts": block.n_experts, "active": block.active, "hidden": block.hidden}
            return kin, _translated(model, family, kin, sizes)
    return family, dict(model.config)


def _translated(
    model: Model, family: Architecture, kin: Architecture, sizes: dict[str, Any]
) -> dict[str, Any]:
    """The config with every value written out under the key of `kin`, whose defaults may be others."""
    values = read_config(family, model.config)
    only_ours = set(family.writes.values()) - set(kin.writes.values()) - set(kin.only)
    config = {key: value for key, value in model.config.items() if key not in only_ours}
    config |= {"model_type": kin.name, "architectures": [kin.classes[0]]}
    for word, how in kin.config.items():
        kind = how.get("is") if isinstance(how, dict) else None
        if kind == "windows":
            windows = {w for w in values.get(word, ()) if w is not None}
            config["sliding_window"] = windows.pop() if windows else None
        elif kind == "rope" and "rope_parameters" not in config:
            config["rope_theta"] = values[word]["rope_theta"]
        elif kind is None and word in sizes | values:
            config[kin.writes[word]] = (values | sizes)[word]
    return config
