"""Train every weight, or those that are chosen, on data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from effc.compiler.auxiliary import answered, total
from effc.compiler.contract import TRAIN, Contract, Fact
from effc.compiler.losses import cross_entropy
from effc.compiler.method import Batch, Work
from effc.compiler.model import Model
from effc.compiler.shapes import Train
from effc.compiler.trained import parameters, training_work, untrainable
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import FOLKLORE


class Full(Train):
    """Minimize the mean surprise -log p(next token) of the data over all weights that are chosen.

    Use when: the model shall learn new text, or recover from what another stage took.
    Costs:    three forward passes' work for each token, 20 bytes of memory for each weight that trains.
    """

    paper = FOLKLORE
    contract = Contract(TRAIN, breaks=(Fact("unit_gain"),))
    examples: ClassVar[tuple[str, ...]] = (
        "adapt.full(data = code, steps = 3, batch = 2)",
        'adapt.full(data = code, steps = 2, batch = 2, train = ["layers[0].mlp.*"], optimizer = sgd())',
    )

    train: str | tuple[str, ...] = Field(
        default="all", description="`all`, `body` (all but embedding and head), or selectors of modules"
    )

    def trains(self, model: Model) -> list[str]:
        return parameters(model, self.train)

    def refuses(self, model: Model, others: Sequence[Model]) -> Sequence[Diagnostic]:
        return untrainable(self.kind, model, self.train)

    def loss(self, student: Model, teachers: Mapping[str, Any], batch: Batch) -> Mapping[str, Tensor]:
        z, more = answered(student, batch)
        return total(cross_entropy(z, batch.labels), more)

    def work(self, model: Model, seq: int = 0) -> Work:
        return training_work(self, model, seq)
