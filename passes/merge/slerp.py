"""The way along the arc between two models, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import acos, sin, sqrt
from typing import ClassVar

import numpy as np
from pydantic import Field

from effc.compiler.contract import LOSSY, Contract, Fact
from effc.compiler.shapes import Array, Merge, Spare, Spot
from effc.kernels.merge.asked import Look, Mix
from effc.kernels.merge.reference import DOT_LANES
from effc.specs.paper import FOLKLORE


class Slerp(Merge):
    """Turn each tensor from the first model to the second: (sin((1-t)O) a + sin(tO) b) / sin O, O the angle.

    The mean of two tensors at an angle is shorter than either; the arc keeps their length. Tensors that are
    nearly parallel, or zero, are mixed on the straight line instead.

    Use when: exactly two models share an ancestor and both should be heard.
    Costs:    nothing at run time; reads both models twice.
    """

    paper = FOLKLORE
    contract = Contract(fidelity=LOSSY, needs=(Fact("dense"),))
    examples = ("merge.slerp()", "merge.slerp(t = 0.3)")
    models: ClassVar[tuple[int, int | None]] = (2, 2)
    rounds: ClassVar[int] = 1

    t: float = Field(
        default=0.5, ge=0, le=1, description="place on the arc: 0 is the first model, 1 the second"
    )
    straight: float = Field(
        default=0.9995, gt=0, le=1, description="cosine of the angle from which on tensors count as parallel"
    )

    def observe(
        self, number: int, parts: Sequence[Array], base: Array | None, known: Array, spare: Spare
    ) -> Array:
        """[3]: a.a, a.b, b.b in float64"""
        a, b = parts
        products = spare(np.float64)
        return np.array([_dot(x, y, products) for x, y in ((a, a), (a, b), (b, b))])

    def look(self, number: int, known: Array) -> Look:
        return Look("dots")

    def settle(self, number: int, seen: Iterable[Array], known: Array) -> Array:
        """[2]: the factors of a and b"""
        aa, ab, bb = (float(value) for value in sum(seen, np.zeros(3)))
        norms = sqrt(aa * bb)
        cosine = ab / norms if norms > 0 else 1.0
        if abs(cosine) > self.straight:
            return np.array([1.0 - self.t, self.t])
        angle = acos(cosine)
        return np.array([sin((1.0 - self.t) * angle), sin(self.t * angle)]) / sin(angle)

    def mix(self, models: int, known: Array) -> Mix:
        return Mix(known.tolist())

    def merge(
        self, parts: Sequence[Array], base: Array | None, known: Array, spare: Spare, spot: Spot
    ) -> Array:
        a, b = parts
        a *= np.float32(known[0])
        b *= np.float32(known[1])
        a += b
        return a


def _dot(a: Array, b: Array, products: Array) -> float:
    """a.b of float32 [N] in float64, where products of theirs are exact; `products` [N] is overwritten.

    Number i goes to the sum i % DOT_LANES, in order; then the sums are added, in order. C does the same.
    """
    np.multiply(a, b, out=products, dtype=np.float64)
    even = a.size - a.size % DOT_LANES
    lanes = np.add.reduce(products[:even].reshape(-1, DOT_LANES), axis=0)
    lanes[: a.size - even] += products[even:]
    return float(np.add.accumulate(lanes)[-1])
