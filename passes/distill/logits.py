"""Train a student to predict what its teacher predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from effc.compiler.auxiliary import answered, total
from effc.compiler.contract import TRAIN, Contract, Fact
from effc.compiler.losses import IGNORED, surprise, weighted
from effc.compiler.method import Batch, ModelRef, Work
from effc.compiler.model import Model
from effc.compiler.shapes import Train
from effc.compiler.trained import parameters, training_work, untrainable
from effc.passes.distill._divergence import divergence
from effc.passes.distill._pair import unlike_vocabularies
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper


class Logits(Train):
    """Minimize kd t^2 D(p_T, p_S) + ce (-log p_S(next token)), with p = softmax(z / t).

    T is the teacher, S the student. D is KL(p_T || p_S) (forward), KL(p_S || p_T) (reverse), Jensen-Shannon
    with weight beta, or the total variation distance; means run over the tokens that carry loss.

    Use when: a stage took something from a model that is still at hand. Forward covers all the teacher does,
              reverse concentrates on what it does most.
    Costs:    as adapt.full, and one forward pass of the teacher for each token.
    """

    paper = Paper("Distilling the Knowledge in a Neural Network", arxiv="1503.02531", year=2015, section="2")
    contract = Contract(TRAIN, breaks=(Fact("unit_gain"),))
    examples: ClassVar[tuple[str, ...]] = (
        "distill.logits(teacher = base, data = code, steps = 3, batch = 2)",
        "distill.logits(teacher = base, data = code, steps = 2, direction = reverse, temperature = 2)",
    )

    teacher: ModelRef = Field(description="the model to learn from")
    direction: Literal["forward", "reverse", "jsd", "tvd"] = Field(
        default="forward", description="which distance from the teacher is minimized"
    )
    temperature: float = Field(
        default=1.0, gt=0, le=100, description="t: above 1 the teacher's unlikely tokens weigh more"
    )
    beta: float = Field(default=0.5, gt=0, lt=1, description="weight of the teacher in the mixture of jsd")
    kd: float = Field(default=0.9, ge=0, description="weight of the distance from the teacher")
    ce: float = Field(default=0.1, ge=0, description="weight of the surprise at the data")
    train: str | tuple[str, ...] = Field(
        default="all", description="`all`, `body` (all but embedding and head), or selectors of modules"
    )

    @model_validator(mode="after")
    def _weighs_something(self) -> Self:
        if not self.kd:
            raise ValueError("kd must be above 0; without a teacher's part this is adapt.full")
        return self

    def trains(self, model: Model) -> list[str]:
        return parameters(model, self.train)

    def refuses(self, model: Model, others: Sequence[Model]) -> Sequence[Diagnostic]:
        found = untrainable(self.kind, model, self.train)
        return [
            *found,
            *(d for teacher in others[-1:] for d in unlike_vocabularies(self.kind, model, teacher)),
        ]

    def loss(self, student: Model, teachers: Mapping[str, Any], batch: Batch) -> Mapping[str, Tensor]:
        """kd, ce and their weighted sum."""
        with torch.no_grad():
            told = teachers["teacher"](batch.ids, step=batch.step)
        z, more = answered(student, batch)
        distance = divergence(self.direction, self.temperature, self.beta)
        terms = [
            (self.kd, lambda z_s, labels, z_t: distance(z_s, z_t)),
            (self.ce, lambda z_s, labels, z_t: surprise(z_s, labels)),
        ]
        loss, (kd, ce) = weighted(z, batch.labels != IGNORED, terms, batch.labels, told)
        return total(loss, more) | {"kd": kd, "ce": ce}

    def work(self, model: Model, seq: int = 0) -> Work:
        return training_work(self, model, seq, teachers=1, teacher=model)
