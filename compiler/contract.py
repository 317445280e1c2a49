"""Contract: what a method needs, gives, breaks and keeps, and how far it may move the function.

Facts are symbolic here: names that `specs/facts.yaml` lists, so that a recipe is checked without a model.
The predicates that measure the same names on a model live in `compiler/facts.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Fact:
    """One checkable statement about a region of a model, e.g. `sparse_2_4(select) when pattern = 2:4`.

    `region` is `select` (the modules the method selects), a role such as `mlp` or `head`, or `model`.
    `condition` holds pairs of a field of the method and the value for which the fact is meant.
    """

    name: str
    region: str = "model"
    condition: tuple[tuple[str, Any], ...] = ()

    def when(self, **fields: Any) -> Fact:
        """The same fact, meant only when every named field has the given value."""
        return replace(self, condition=(*self.condition, *fields.items()))

    def applies(self, method: object) -> bool:
        """Whether the fields of `method` meet the condition."""
        return all(getattr(method, field) == value for field, value in self.condition)

    def __str__(self) -> str:
        head = f"{self.name}({self.region})"
        if not self.condition:
            return head
        return f"{head} when {_words(self.condition)}"


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How far the outputs may move, relative to their range; None when no bound is promised.

    `condition` holds pairs of a field of the method and the value for which this is promised; with other
    values `otherwise` is.
    """

    name: str
    tolerance: float | None = None
    condition: tuple[tuple[str, Any], ...] = ()
    otherwise: Fidelity | None = None

    def when(self, otherwise: Fidelity, **fields: Any) -> Fidelity:
        """Promised when every named field has the given value; `otherwise` when one has not."""
        return replace(self, condition=tuple(fields.items()), otherwise=otherwise)

    def of(self, method: object) -> Fidelity:
        """What the arguments of `method` make of it."""
        if self.otherwise is None:
            return self
        given = [(getattr(method, field), value) for field, value in self.condition]
        # 1 is a number of channels, say, and 1.0 a share of them
        if all(type(one) is type(value) and one == value for one, value in given):
            return replace(self, condition=(), otherwise=None)
        return self.otherwise.of(method)

    def __str__(self) -> str:
        word = f"WITHIN({self.tolerance:g})" if self.name == "WITHIN" else self.name
        if self.otherwise is None:
            return word
        return f"{word} when {_words(self.condition)}, else {self.otherwise}"

    @property
    def wants_training(self) -> bool:
        """Whether a recipe that never trains afterwards deserves a warning."""
        return self.name == "HEALED"


EXACT = Fidelity("EXACT", 1e-9)
"""The same function: a float64 clone moves by at most 1e-9 of the output range, float32 by at most 1e-4."""

EXACT_FLOAT32 = 1e-4
"""The gate of EXACT in float32: reordered sums may move an output this far."""

LOSSY = Fidelity("LOSSY")
"""Another function, used as it is: the error is measured and reported, without a bound."""

HEALED = Fidelity("HEALED")
"""Another function, meant to be trained afterwards; the loss before, after and healed is reported."""

TRAIN = Fidelity("TRAIN")
"""A training stage: the function moves because it is meant to."""


def WITHIN(tolerance: float) -> Fidelity:
    """The outputs move by at most `tolerance` of their range."""
    if not tolerance > 0:
        raise ValueError(f"WITHIN needs a tolerance above 0, got {tolerance!r}; the same function is EXACT")
    return Fidelity("WITHIN", tolerance)


@dataclass(frozen=True, slots=True)
class Contract:
    """How far the function moves; facts that must hold before, will hold after, end, or survive.

    Layout facts (packed, sparse, tied, low rank) that stand neither in `gives` nor in `keeps` are lost.
    Read on a method with arguments, `method.contract` has the fidelity that these arguments promise.
    """

    fidelity: Fidelity
    needs: tuple[Fact, ...] = ()
    gives: tuple[Fact, ...] = ()
    breaks: tuple[Fact, ...] = ()
    keeps: tuple[Fact, ...] = ()

    def __get__(self, method: object | None, owner: type | None = None) -> Contract:
        if method is None or self.fidelity.otherwise is None:
            return self
        return replace(self, fidelity=self.fidelity.of(method))


def _words(condition: tuple[tuple[str, Any], ...]) -> str:
    return " and ".join(f"{field} = {_word(value)}" for field, value in condition)


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(getattr(value, "value", value))
