"""Warmup, stable, decay."""

from __future__ import annotations

from math import sqrt
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from effc.runtime.parts.train.schedule._warmup import Warmed
from effc.specs.paper import Paper
from effc.specs.units import Share


class WSD(Warmed):
    """rate = 1 until the last `decay` share of the steps, then down to `final` in the given form.

    With x from 0 to 1 over the decay: linear 1 - x, exp final^x, sqrt 1 - sqrt(x), scaled to end at `final`.

    Use when: the same stable run shall be continued later, or branched into several lengths.
    """

    paper = Paper(
        "MiniCPM: Unveiling the Potential of Small Language Models",
        arxiv="2404.06395",
        year=2024,
        section="4",
    )
    examples: ClassVar[tuple[str, ...]] = ("wsd(decay = 20%)", "wsd(decay = 10%, form = exp, final = 10%)")

    decay: Share = Field(default=0.2, ge=0, le=1, description="share of the steps over which the rate falls")
    form: Literal["linear", "exp", "sqrt"] = Field(default="linear", description="how it falls")
    final: Share = Field(
        default=0.0, ge=0, le=1, description="share of the full rate that is left at the end"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.form == "exp" and not self.final:
            raise ValueError("an exponential decay needs `final` above 0, for example final = 10%")
        if self.warmup + self.decay > 1:
            raise ValueError(
                f"warmup and decay together take {self.warmup + self.decay:.0%} of the steps, at most 100%"
            )
        return self

    def rate(self, step: int, steps: int) -> float:
        falls = round(self.decay * steps)
        if falls and step >= steps - falls:
            return self._fall((step - (steps - falls)) / falls)
        return super().rate(step, steps)

    def after(self, step: int, steps: int) -> float:
        return 1.0

    def _fall(self, x: float) -> float:
        if self.form == "exp":
            return float(self.final**x)
        left = 1 - x if self.form == "linear" else 1 - sqrt(x)
        return self.final + (1 - self.final) * left
