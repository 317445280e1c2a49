"""Role: what a module is for, whatever the checkpoint calls it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ROLES = (
    "embedding",
    "embedding.position",
    "embedding.type",
    "embedding.patch",
    "embedding.class",
    "norm",
    "attention",
    "attention.q",
    "attention.k",
    "attention.v",
    "attention.o",
    "attention.gate",
    "attention.forget_down",
    "attention.forget_up",
    "attention.rate",
    "attention.momentum",
    "mlp",
    "mlp.gate",
    "mlp.up",
    "mlp.down",
    "moe",
    "moe.router",
    "moe.experts.gate",
    "moe.experts.up",
    "moe.experts.down",
    "moe.shared.gate",
    "moe.shared.up",
    "moe.shared.down",
    "moe.channels",
    "router",
    "enter",
    "enter.router",
    "enter.router_up",
    "enter.guess",
    "head",
    "exit.head",
    "exit.gate",
    "learner",
    "predictor",
    "prefix",
    "aggregate",
    "aggregate.mix",
    "aggregate.score",
    "scale",
    "fast",
    "cell",
    "linear",
    "conv",
    "other",
)
"""Every role name there is; the last three belong to traced modules."""

_LAYER = re.compile(r"^layers\.(\d+)\.(.+)$")
_LAST = {
    "prefix": "prefix",
    "position": "embedding.position",
    "token_type": "embedding.type",
    "cls": "embedding.class",
}
_LAST |= dict.fromkeys(("attention_scale", "mlp_scale", "moe_scale"), "scale")
_LAST |= dict.fromkeys(("learners_in", "learners_out", "choose_in", "choose_out"), "learner")
_LAST |= dict.fromkeys(("fire_in", "fire_out"), "predictor")
_LAST |= dict.fromkeys(("fast_in", "fast_gate", "fast_out", "q_affine", "k_affine"), "fast")
_LAST |= dict.fromkeys(("peep", "local", *(f"gate_{name}" for name in "zrcfu")), "cell")


@dataclass(frozen=True, slots=True, order=True)
class Role:
    """A name such as `mlp.up`, and the layer it sits in (None outside the layers)."""

    name: str
    layer: int | None = None

    def within(self, prefix: str) -> bool:
        """True for the role `prefix` itself and for what lies below it: mlp.up is within mlp."""
        return self.name == prefix or self.name.startswith(prefix + ".")

    def key(self) -> tuple[int, str]:
        """Sort key: by layer, what has no layer first."""
        return (-1 if self.layer is None else self.layer, self.name)

    def __str__(self) -> str:
        return self.name if self.layer is None else f"{self.name}[{self.layer}]"

    def as_json(self) -> list[Any]:
        return [self.name, self.layer]


def canonical(path: str) -> Role | None:
    """The role a canonical module path has, None for containers: layers.3.mlp.up -> mlp.up[3]."""
    found = _LAYER.match(path)
    layer, rest = (int(found[1]), found[2]) if found else (None, path)
    last = rest.rpartition(".")[2]
    if "norm" in last:  # norm, norm1, norm2_post, attention.q_norm, embedding.norm
        return Role("norm", layer)
    if layer is None and rest.startswith("router."):
        return Role("router")
    name = _LAST.get(last, rest)
    return Role(name, layer) if name in ROLES else None


def renumber(path: str, layers: Mapping[int, int]) -> str:
    """The path after layers got new numbers; a path outside the layers stays."""
    found = _LAYER.match(path)
    return f"layers.{layers[int(found[1])]}.{found[2]}" if found else path


def layer_of(path: str) -> int | None:
    """The layer a canonical path lies in."""
    found = _LAYER.match(path)
    return int(found[1]) if found else None
