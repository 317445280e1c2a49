"""The weighted mean of models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from effc.compiler.contract import LOSSY, Contract
from effc.compiler.model import Model
from effc.compiler.shapes import Array, Merge, Spare, Spot
from effc.kernels.merge.asked import Mix
from effc.passes.merge._weights import shares, wrong_weights
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper


class Linear(Merge):
    """Add up the weights of models, each times its share: theta = sum_k w_k theta_k / sum_k w_k.

    Use when: the models were fine-tuned from one ancestor, for one task or with small changes.
    Costs:    nothing at run time; models from different starts average to noise. Adapters stay apart from the
              weights: the mean of several is one adapter of the sum of their ranks.
    """

    paper = Paper(
        "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing "
        "inference time",
        arxiv="2203.05482",
        year=2022,
        section="2",
    )
    contract = Contract(fidelity=LOSSY)
    examples = ("merge.linear()", "merge.linear(weight = [3, 1])")

    weight: tuple[float, ...] = Field(
        default=(), description="share of each model, in their order; all 1 unless written"
    )
    normalize: bool = Field(default=True, description="divide the shares by their sum")

    def refuses(self, model: Model, others: Sequence[Model]) -> Sequence[Diagnostic]:
        wrong = wrong_weights(self.kind, self.weight, 1 + len(others), self.normalize)
        return [*super().refuses(model, others), *wrong]

    def shares(self, models: int) -> Sequence[float]:
        return shares(self.weight, models, self.normalize)

    def mix(self, models: int, known: Array) -> Mix:
        return Mix(shares(self.weight, models, self.normalize))

    def merge(
        self, parts: Sequence[Array], base: Array | None, known: Array, spare: Spare, spot: Spot
    ) -> Array:
        total, *rest = parts
        first, *others = shares(self.weight, len(parts), self.normalize)
        total *= np.float32(first)
        for share, part in zip(others, rest, strict=True):
            part *= np.float32(share)
            total += part
        return total
