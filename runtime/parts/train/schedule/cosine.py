"""Half a cosine, from the full rate down to a floor."""

from __future__ import annotations

from math import cos, pi
from typing import ClassVar

from pydantic import Field

from effc.runtime.parts.train.schedule._warmup import Warmed
from effc.specs.paper import Paper
from effc.specs.units import Share


class Cosine(Warmed):
    """rate = final + (1 - final) (1 + cos(pi s / S)) / 2 at step s of S.

    Use when: the number of steps is fixed.
    """

    paper = Paper(
        "SGDR: Stochastic Gradient Descent with Warm Restarts", arxiv="1608.03983", year=2016, section="3"
    )
    examples: ClassVar[tuple[str, ...]] = ("cosine()", "cosine(warmup = 2%, final = 10%)")

    final: Share = Field(
        default=0.0, ge=0, le=1, description="share of the full rate that is left at the end"
    )

    def after(self, step: int, steps: int) -> float:
        return self.final + (1 - self.final) * (1 + cos(pi * step / steps)) / 2
