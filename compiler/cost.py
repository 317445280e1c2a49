"""Cost: what a model weighs and what it does per token, counted in closed form and never by running.

Symbols as in the planner baseline: a block's forward FLOPs per token are 2 for every weight it multiplies
by, plus 4 * mean * heads * head_dim for attention over `mean` keys.
"""

from __future__ import annotations

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
    for _, unit in model.units():
        for tensor, logical in unit.stored():
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            params += logical
            stored += tensor.numel() * tensor.element_size()
        flops += unit.flops(mean)
        kv += unit.kv_bytes()
        state += unit.state_bytes()
    for tensor in model.tensors().values():
        if id(tensor) not in seen:  # a traced module's own layers are no units
            params += tensor.numel()
            stored += tensor.numel() * tensor.element_size()
    return Cost(params, stored, flops, kv, state)


def cache_bytes(model: Model, tokens: int) -> int:
    """Bytes of the cache of one sequence with room for so many tokens, as generation makes it."""
    return sum(unit.cache_bytes(tokens) for _, unit in model.units())
