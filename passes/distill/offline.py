"""Train a student on the likeliest tokens of a teacher that has spoken before and is gone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from effc.compiler.auxiliary import answered, total
from effc.compiler.contract import TRAIN, Contract, Fact
from effc.compiler.losses import IGNORED, surprise, weighted
from effc.compiler.method import Batch, Context, ModelRef, Work
from effc.compiler.model import Model
from effc.compiler.shapes import Train
from effc.compiler.trained import parameters, training_work, untrainable
from effc.passes.distill._captured import Captured, capture, told_bytes
from effc.passes.distill._pair import unlike_vocabularies
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper

_TAIL = 1e-6
"""Least mass of the tail: float32 cannot tell less from nothing."""


class Offline(Train):
    """Minimize kd sum_i p_i (log p_i - log q_i) + ce (-log q(next token)) over the k likeliest tokens of p.

    p is the teacher's distribution, q the student's, P and Q their mass on the k tokens. `missing` says what
    stands for the rest: bucket adds (1 - P) log((1 - P) / (1 - Q)), renormalize divides p by P.

    Use when: the teacher is too large to sit beside the student, or several students learn from it.
    Costs:    one pass of the teacher over the sequences, 6 k bytes kept for each token. The bucket is a lower
              bound of the full distance, the other two are biased.
    """

    paper = Paper("Distilling the Knowledge in a Neural Network", arxiv="1503.02531", year=2015, section="2")
    contract = Contract(TRAIN, breaks=(Fact("unit_gain"),))
    recuts: ClassVar[bool] = False
    examples: ClassVar[tuple[str, ...]] = (
        "distill.offline(teacher = base, data = code, steps = 3, batch = 2, k = 16)",
        "distill.offline(teacher = base, data = code, steps = 2, batch = 2, k = 8, missing = renormalize)",
    )

    teacher: ModelRef = Field(description="the model to learn from")
    k: int = Field(default=64, ge=1, description="tokens kept of each distribution, the likeliest first")
    missing: Literal["bucket", "zero", "renormalize"] = Field(
        default="bucket", description="what stands for the tokens that were not kept"
    )
    stored: Literal["fp16", "fp32"] = Field(default="fp16", description="dtype of the kept log-probabilities")
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
        for teacher in others[-1:]:
            found += unlike_vocabularies(self.kind, model, teacher)
            width = int(getattr(teacher.module("head"), "out_features", self.k))
            if self.k > width:
                title = f"`k` of `{self.kind}` is larger than the vocabulary"
                found.append(
                    Diagnostic("E202", title, notes=(f"k = {self.k}, vocabulary {width}",), about="k")
                )
        return found

    def teach(
        self, teachers: Mapping[str, Model], batches: Iterable[Batch], context: Context
    ) -> Mapping[str, Any]:
        """The teacher's words in place of the teacher."""
        dtype = torch.float16 if self.stored == "fp16" else torch.float32
        return {"teacher": capture(teachers["teacher"], batches, self.k, dtype, context)}

    def loss(self, student: Model, teachers: Mapping[str, Any], batch: Batch) -> Mapping[str, Tensor]:
        """kd, ce and their weighted sum."""
        captured: Captured = teachers["teacher"]
        ids, logp = captured.told(batch)
        z, more = answered(student, batch)
        terms = [
            (self.kd, lambda z_s, labels, i, p: self.distance(z_s, i, p)),
            (self.ce, lambda z_s, labels, i, p: surprise(z_s, labels)),
        ]
        loss, (kd, ce) = weighted(z, batch.labels != IGNORED, terms, batch.labels, ids, logp)
        return total(loss, more) | {"kd": kd, "ce": ce}

    def distance(self, z_s: Tensor, ids: Tensor, logp: Tensor) -> Tensor:
        """z_s [n, V], ids [n, k] int64, logp [n, k] -> [n] nats"""
        logq = torch.log_softmax(z_s, -1).gather(-1, ids)
        p = logp.exp()
        mass = p.sum(-1)
        if self.missing == "renormalize":
            logp, p = logp - mass.log()[:, None], p / mass[:, None]
        kept = (p * (logp - logq)).sum(-1)
        if self.missing != "bucket" or ids.shape[-1] == z_s.shape[-1]:
            return kept
        rest = (1 - mass).clamp(min=_TAIL)
        left = (1 - logq.exp().sum(-1)).clamp(min=_TAIL)
        return kept + rest * (rest.log() - left.log())

    def work(self, model: Model, seq: int = 0) -> Work:
        rows = self.steps * self.batch * seq
        kept = Work(
            disk=2 * told_bytes(rows, self.k, self.stored), memory=told_bytes(rows, self.k, self.stored)
        )
        return training_work(self, model, seq, teachers=1, teacher=model) + kept
