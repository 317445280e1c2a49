"""The way along the arc between two models, tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence
from math import acos, sin, sqrt
from typing import ClassVar

import numpy as np
from pydantic import Field

from effc.compiler.contract import LOSSY, Contract
from effc.compiler.shapes import Array, Merge, Spare
from effc.specs.paper import FOLKLORE

STRIP = 1 << 13
"""Numbers turned into float64 at a time: 64 kB, which never leave the nearest cache."""


class Slerp(Merge):
    """Turn each tensor from the first model to the second: (sin((1-t)O) a + sin(tO) b) / sin O, O the angle.

    The mean of two tensors at an angle is shorter than either; the arc keeps their length. Tensors that are
    nearly parallel, or zero, are mixed on the straight line instead.

    Use when: exactly two models share an ancestor and both should be heard.
    Costs:    nothing at run time; reads both models twice.
    """

    paper = FOLKLORE
    contract = Contract(fidelity=LOSSY)
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
        total = np.zeros(3)
        for start in range(0, parts[0].size, STRIP):
            a, b = (part[start : start + STRIP].astype(np.float64) for part in parts)
            total += (a @ a, a @ b, b @ b)
        return total

    def settle(self, number: int, total: Array, known: Array) -> Array:
        """[2]: the factors of a and b"""
        aa, ab, bb = (float(value) for value in total)
        norms = sqrt(aa * bb)
        cosine = ab / norms if norms > 0 else 1.0
        if abs(cosine) > self.straight:
            return np.array([1.0 - self.t, self.t])
        angle = acos(cosine)
        return np.array([sin((1.0 - self.t) * angle), sin(self.t * angle)]) / sin(angle)

    def merge(self, parts: Sequence[Array], base: Array | None, known: Array, spare: Spare) -> Array:
        a, b = parts
        a *= np.float32(known[0])
        b *= np.float32(known[1])
        a += b
        return a
