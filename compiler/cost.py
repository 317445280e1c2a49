"""Cost: what a model weighs and what it does per token, counted in closed form and never by running.

Symbols as in the planner baseline: a block's forward FLOPs per token are 2 for every weight it multiplies
by, plus 4 * mean * heads * head_dim for attention over `mean` keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from effc.compiler.model import Model


@dataclass(frozen=True, slots=True)
class Cost:
    params: int = 0
    """Logical weights: a packed weight counts as the weights it stands for, a tied one once."""
    bytes: int = 0
    """Bytes of all stored tensors at rest; a tied one once."""
    flops_per_token: int = 0
    """Forward floating-point operations for one token."""
    kv_bytes_per_token: int = 0
    """Bytes that one token adds to the key-value cache, however long the sequence."""
    state_bytes: int = 0
    """Bytes of a sequence's cache that do not grow with it: recurrent states and rings of windows."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Cost)))

    def __sub__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(Cost)))


def count(model: Model, mean: int = 0) -> Cost:
    """The cost of a model (meta or real) with `mean` keys attended to on average."""
    seen: set[int] = set()
    params = stored = flops = kv = state = 0
    often, run = repeats(model), _run_by(model)
    for path, unit in model.units():
        for tensor, logical in unit.stored():
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            params += logical
            stored += tensor.numel() * tensor.element_size()
        times = often if path.startswith("layers.") else 1
        flops += times * round(unit.flops(mean) * (_share(path, run) if run else 1))
        kv += times * unit.kv_bytes()
        state += times * unit.state_bytes()
    for tensor in model.tensors().values():
        if id(tensor) not in seen:  # a traced module's own layers are no units
            params += tensor.numel()
            stored += tensor.numel() * tensor.element_size()
    return Cost(params, stored, flops, kv, state)


def _run_by(model: Model) -> dict[str, float]:
    """Path of a block -> the share of tokens that run it, of blocks inside of loops that some tokens run."""
    from effc.compiler.blocks.recursion import Enter, Leave

    found: dict[str, float] = {}
    inside: float | None = None
    for node in model.gm.graph.nodes:
        if node.op != "call_module":
            continue
        block = model.module(str(node.target))
        if isinstance(block, Leave):
            inside = None
        if inside is not None:
            found[str(node.target)] = inside
        if isinstance(block, Enter):
            inside = block.share
    return found


def _share(path: str, run: Mapping[str, float]) -> float:
    """The share of tokens that run the unit at a path."""
    while path:
        if path in run:
            return run[path]
        path = path.rpartition(".")[0]
    return 1.0


def cache_bytes(model: Model, tokens: int) -> int:
    """Bytes of the cache of one sequence with room for so many tokens, as generation makes it."""
    return repeats(model) * sum(unit.cache_bytes(tokens) for _, unit in model.units())


def repeats(model: Model) -> int:
    """How often the layers run for one token: once, or in every stream of a model that has several."""
    return int(getattr(getattr(model.gm, "streams", None), "streams", 1))
