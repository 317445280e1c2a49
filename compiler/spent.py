"""Spent: what a model really computes, counted while it runs: rows that enter its weights, not rows of the
batch.

`count` says what a token costs where nothing depends on data. Where tokens leave early or skip a block, this
counts what was left of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from effc.compiler.blocks.acm import ACM
from effc.compiler.blocks.attention import Attention
from effc.compiler.blocks.exit import Exit
from effc.compiler.blocks.fire_mlp import FireMLP
from effc.compiler.blocks.skipping import SkipAttention, SkipHead, SkipMLP
from effc.compiler.blocks.unit import Unit
from effc.compiler.ops_adaptive import running
from effc.compiler.roles import layer_of

if TYPE_CHECKING:
    from effc.compiler.model import Model


@dataclass(slots=True)
class Spent:
    """What was counted so far."""

    tokens: int = 0
    flops: int = 0
    """Forward floating-point operations of all tokens."""
    ran: dict[int, int] = field(default_factory=dict)
    """Layer -> tokens that ran through its attention."""

    @property
    def flops_per_token(self) -> float:
        return self.flops / max(1, self.tokens)

    @property
    def depth(self) -> float:
        """Layers that a token ran through on average."""
        return sum(self.ran.values()) / max(1, self.tokens)


@contextmanager
def counting(model: Model, mean: int) -> Iterator[Spent]:
    """Counts while the context is open; `mean` keys are taken for what a token attends to, as in a plan."""
    found = Spent()
    handles = [_tokens(model, found)]
    masked = {id(leaf) for _, unit in model.units() if isinstance(unit, FireMLP) for leaf in _masked(unit)}
    for path, unit in model.units():
        if isinstance(unit, FireMLP):
            handles.append(_fired(unit, found))
        if id(unit) in masked:
            continue
        door, flops = _door(unit, mean)
        if flops or isinstance(unit, Attention):
            layer = layer_of(path) if isinstance(unit, Attention) else None
            handles.append(_watched(door, flops, layer, found))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _door(unit: Unit, mean: int) -> tuple[nn.Module, int]:
    """The module that a token enters if the unit runs for it, and what the unit itself costs then."""
    if isinstance(unit, ACM):  # each learner that runs is called
        return unit.learners_in, unit.learner_flops()
    if isinstance(unit, SkipAttention):
        return unit.o, Attention.flops(unit, mean)
    if isinstance(unit, Attention):
        return unit.o, unit.flops(mean)
    if isinstance(unit, Exit):  # its gate is computed without being called
        return unit.head, unit.flops(mean) + unit.gate.flops(mean)
    if isinstance(unit, SkipMLP):
        return unit, 0
    return unit, unit.flops(mean)


def _masked(unit: FireMLP) -> list[nn.Module]:
    """Weights of which a token uses the channels that fire."""
    return [unit.up, unit.down, *((unit.gate,) if unit.gated else ())]


def _fired(unit: FireMLP, found: Spent) -> Any:
    def leave(_: nn.Module, __: Any, z: Tensor) -> None:
        found.flops += int((z > 0).sum()) * unit.channel_flops()

    return unit.fire_out.register_forward_hook(leave)


def _tokens(model: Model, found: Spent) -> Any:
    def enter(_: nn.Module, args: tuple[Any, ...]) -> None:
        found.tokens += args[0].shape[:2].numel()

    return model.module("embedding").register_forward_pre_hook(enter)


def _watched(door: nn.Module, flops: int, layer: int | None, found: Spent) -> Any:
    def enter(_: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(door, SkipHead):  # chooses its rows itself
            rows = int(running(args[1], args[0], least=1).sum())
        else:
            rows = args[0].shape[:-1].numel()
        found.flops += rows * flops
        if layer is not None:
            found.ran[layer] = found.ran.get(layer, 0) + rows

    return door.register_forward_pre_hook(enter)
