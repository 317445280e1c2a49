"""One rate from start to end."""

from __future__ import annotations

from typing import ClassVar

from effc.runtime.parts.train.schedule._warmup import Warmed
from effc.specs.paper import FOLKLORE


class Constant(Warmed):
    """rate = 1 after the warmup.

    Use when: the end is not known yet, or for the plain line of comparison.
    """

    paper = FOLKLORE
    examples: ClassVar[tuple[str, ...]] = ("constant()", "constant(warmup = 10%)")

    def after(self, step: int, steps: int) -> float:
        return 1.0
