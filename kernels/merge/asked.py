"""What a merge says of its own arithmetic, so that C can do it: how numbers mix, what is looked at before.

The merge's numpy stays beside it: it serves where there is no compiler, and it is what the C must equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from effc.compiler.shapes import Array

Keep = Literal["all", "above", "drawn"]
Join = Literal["sum", "elected", "voted"]


@dataclass(frozen=True, slots=True)
class Mix:
    """theta = base + scale join_k(share_k keep(theta_k - base)); without a base: sum_k share_k theta_k.

    Every product and every sum is rounded to float32, in the order of the models.
    """

    shares: Sequence[float]
    """One factor a model."""
    join: Join = "sum"
    """Add up; or the mean of what has the sign of the sum, or of the sum of signs, weighted by shares."""
    keep: Keep = "all"
    """Which changes count: all, those of at least `above`, or those drawn (draws.py) below `below`."""
    above: Sequence[float] = ()
    """The smallest magnitude that is kept, one a model."""
    below: int = 0
    seed: int = 0
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Look:
    """What is gathered of the numbers before they mix."""

    form: Literal["dots", "upper", "lower"]
    """a.a, a.b and b.b; counts of the upper halves of |theta_k - base|; lower halves of those in a bin."""
    bins: Sequence[int] = ()
    """The upper half in question, one a model."""


@runtime_checkable
class Mixing(Protocol):
    """A merge whose mixing has a kernel."""

    def mix(self, models: int, known: Array) -> Mix:
        """How so many models mix once `known` is settled."""
        ...


@runtime_checkable
class Looking(Protocol):
    """A merge whose rounds before have kernels. What they give is what its own `observe` would."""

    def look(self, number: int, known: Array) -> Look:
        """What round `number` gathers."""
        ...
