"""Warmup: every schedule may begin by climbing in a straight line."""

from __future__ import annotations

from pydantic import Field

from effc.compiler.method import Schedule
from effc.specs.units import Share


class Warmed(Schedule):
    """A schedule whose first `warmup` share of the steps climbs from 0; `after` describes the rest."""

    warmup: Share = Field(
        default=0.05, ge=0, lt=1, description="share of the steps that climb from 0 to the full rate"
    )

    def rate(self, step: int, steps: int) -> float:
        climb = round(self.warmup * steps)
        if step < climb:
            return (step + 1) / climb
        return self.after(step - climb, max(1, steps - climb))

    def after(self, step: int, steps: int) -> float:
        """The factor at `step` of the `steps` behind the warmup."""
        raise NotImplementedError
