"""Drop a share of every change at random, scale up what is left, then settle which way each weight goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, Field

from effc.compiler.contract import LOSSY, Contract, Fact
from effc.compiler.method import ModelRef
from effc.compiler.model import Model
from effc.compiler.shapes import Array, Merge, Spare, Spot
from effc.kernels.merge.asked import Mix
from effc.kernels.merge.draws import ODDS, drawn
from effc.passes.merge._elect import Sign, elected, wrong_votes
from effc.passes.merge._weights import shares, wrong_weights
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper
from effc.specs.units import Share


class DareTies(Merge):
    """Keep each entry of a change with probability `density`, divided by it; elect signs and average as ties.

    With d_k = theta_k - base: an entry kept is d_k / density, so that the expected change is d_k. Then as
    merge.ties without its trim: the sign is that of sum_k w_k d_k, and theta = base + lambda * (sum of
    w_k d_k with that sign) / (sum of their w_k). The draw of an entry depends on `seed`, the place of its
    model in the list and its own place in its tensor, and on nothing else.

    Use when: many fine-tunes of one base are merged, whose changes are small and redundant (supervised
              fine-tuning, not continued pre-training).
    Costs:    nothing at run time; a low density adds noise.
    """

    paper = Paper(
        "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
        arxiv="2311.03099",
        year=2023,
        section="3",
    )
    contract = Contract(fidelity=LOSSY, needs=(Fact("dense"),))
    examples = (
        "merge.dare_ties(base = base)",
        "merge.dare_ties(base = base, density = 30%, lambda = 0.7, seed = 1)",
    )
    models: ClassVar[tuple[int, int | None]] = (1, None)

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    base: ModelRef = Field(description="the model that the others were fine-tuned from")
    density: Share = Field(default=0.5, gt=0, le=1, description="share of each change that is kept")
    weight: tuple[float, ...] = Field(default=(), description="factor of each change; all 1 unless written")
    lambda_: float = Field(default=1.0, alias="lambda", description="factor of the merged change")
    sign: Sign = Field(default="sum", description="elect by the sum of the changes or by their number")
    rescale: Literal["exact", "none"] = Field(
        default="exact", description="divide what is kept by its share, or leave it as it is"
    )
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="what is drawn at random follows from it")

    def refuses(self, model: Model, others: Sequence[Model]) -> Sequence[Diagnostic]:
        wrong = wrong_weights(self.kind, self.weight, len(others))  # the base is one of the others
        return [*super().refuses(model, others), *wrong, *wrong_votes(self.kind, self.weight)]

    def mix(self, models: int, known: Array) -> Mix:
        below = self._below
        return Mix(
            shares(self.weight, models),
            "elected" if self.sign == "sum" else "voted",
            "drawn" if below < ODDS else "all",
            below=below,
            seed=self.seed,
            scale=self.lambda_ / self._kept,
        )

    def merge(
        self, parts: Sequence[Array], base: Array | None, known: Array, spare: Spare, spot: Spot
    ) -> Array:
        assert base is not None
        below = self._below
        for number, change in enumerate(parts):
            change -= base
            if below < ODDS:
                change *= np.less(drawn(self.seed, number, spot, change.size), below)
        change = elected(parts, shares(self.weight, len(parts)), self.sign, spare)
        if self.lambda_ != self._kept:
            change *= np.float32(self.lambda_ / self._kept)
        change += base
        return change

    @property
    def _below(self) -> int:
        """What a draw must stay below: the density in steps of 1 / ODDS."""
        return max(1, round(self.density * ODDS))

    @property
    def _kept(self) -> float:
        """What changes that are kept are divided by."""
        return self._below / ODDS if self.rescale == "exact" else 1.0
