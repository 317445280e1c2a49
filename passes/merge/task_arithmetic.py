"""Add what each model learned to the base they came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

import numpy as np
from pydantic import ConfigDict, Field, model_validator

from effc.compiler.contract import LOSSY, Contract
from effc.compiler.method import ModelRef
from effc.compiler.model import Model
from effc.compiler.shapes import Array, Merge, Spare, Spot
from effc.kernels.merge.asked import Mix
from effc.passes.merge._weights import shares, wrong_weights
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper


class TaskArithmetic(Merge):
    """Scale and add the changes that each model made: theta = base + lambda sum_k w_k (theta_k - base).

    Use when: fine-tunes of one base should be combined, or one unlearned (a negative lambda).
    Costs:    nothing at run time; changes that disagree cancel, see merge.ties.
    """

    paper = Paper("Editing Models with Task Arithmetic", arxiv="2212.04089", year=2022, section="2")
    contract = Contract(fidelity=LOSSY)
    examples = ("merge.task_arithmetic(base = base)", "merge.task_arithmetic(base = base, lambda = 0.3)")
    models: ClassVar[tuple[int, int | None]] = (1, None)

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    base: ModelRef = Field(description="the model that the others were fine-tuned from")
    weight: tuple[float, ...] = Field(default=(), description="factor of each change; all 1 unless written")
    lambda_: float = Field(
        default=1.0,
        alias="lambda",
        description="factor of the sum; negative unlearns, 0 would change nothing",
    )

    @model_validator(mode="after")
    def _moves_something(self) -> Self:
        if not self.lambda_:
            raise ValueError("lambda = 0 gives back the base; write another factor, or use the base itself")
        return self

    def refuses(self, model: Model, others: Sequence[Model]) -> Sequence[Diagnostic]:
        """`others` ends with the base."""
        models = [model, *others[:-1]]
        return [
            *super().refuses(model, others),
            *wrong_weights(self.kind, self.weight, len(models)),
            *self._twice(models),
        ]

    def _twice(self, models: Sequence[Model]) -> list[Diagnostic]:
        """A warning where one model stands in the list more than once."""
        places = [[k for k, other in enumerate(models, 1) if other is model] for model in models]
        double = next((found for found in places if len(found) > 1), None)
        if double is None:
            return []
        said = " and ".join(map(str, double))
        return [
            Diagnostic(
                "W452",
                f"`{self.kind}` is given one model {len(double)} times",
                notes=(
                    f"numbers {said} of the list are the same, so its change is added {len(double)} times",
                ),
                help="take it out, or write a larger `weight` for it",
                severity="warning",
            )
        ]

    def shares(self, models: int) -> Sequence[float]:
        return [share * self.lambda_ for share in shares(self.weight, models)]

    def mix(self, models: int, known: Array) -> Mix:
        return Mix(self.shares(models))

    def merge(
        self, parts: Sequence[Array], base: Array | None, known: Array, spare: Spare, spot: Spot
    ) -> Array:
        assert base is not None
        total, *rest = parts
        first, *others = shares(self.weight, len(parts))
        total -= base
        total *= np.float32(first * self.lambda_)
        for share, part in zip(others, rest, strict=True):
            part -= base
            part *= np.float32(share * self.lambda_)
            total += part
        total += base
        return total
