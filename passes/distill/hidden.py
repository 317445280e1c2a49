"""Train a student to carry the hidden states that its teacher carries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor

from effc.compiler.auxiliary import answered, total
from effc.compiler.contract import TRAIN, Contract, Fact
from effc.compiler.layer_outputs import layer_outputs
from effc.compiler.losses import IGNORED, surprise, weighted
from effc.compiler.method import Batch, ModelRef, Work
from effc.compiler.model import Model
from effc.compiler.shapes import Train
from effc.compiler.trained import parameters, training_work, untrainable
from effc.passes.distill._divergence import divergence
from effc.passes.distill._hidden import distance, matched
from effc.passes.distill._pair import unlike_vocabularies
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper


class Hidden(Train):
    """Minimize weight * mean_l D(h_S^l, h_T^m(l)) + kd KL(p_T || p_S) + ce (-log p_S(next token)).

    h^l is the stream behind layer l, before the norm that reads it. `map = uniform` holds layer l of n to
    layer round((l + 1) N / n) - 1 of the teacher's N; `tail` holds the last `tail` layers of both alone and
    leaves those before them free; `pairs` names [student, teacher] layers, counted from 0. D is the mean
    square, that over the mean square of h_T (the same for every layer), or 1 - cosine.

    Use when: a stage took layers or shared them: streams of one width are compared.
    Costs:    as distill.logits; a step keeps the streams of both at the layers compared.
    """

    paper = Paper("FitNets: Hints for Thin Deep Nets", arxiv="1412.6550", year=2014, section="3")
    contract = Contract(TRAIN, breaks=(Fact("unit_gain"),))
    examples: ClassVar[tuple[str, ...]] = (
        "distill.hidden(teacher = base, data = code, steps = 3, batch = 2)",
        "distill.hidden(teacher = base, data = code, steps = 2, map = tail, tail = 2, loss = cosine, kd = 0)",
        "distill.hidden(teacher = base, data = code, steps = 2, pairs = [[1, 2], [5, 5]], loss = mse)",
    )

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    teacher: ModelRef = Field(description="the model to learn from")
    map: Literal["uniform", "tail"] = Field(
        default="uniform", description="layers compared: all, by their share of depth, or the last ones"
    )
    tail: int = Field(default=1, ge=1, description="how many last layers, of map = tail")
    pairs: tuple[tuple[int, int], ...] = Field(
        default=(), description="[student, teacher] layers, in place of `map`"
    )
    loss_: Literal["mse", "cosine", "normalized"] = Field(
        default="normalized", alias="loss", description="how far two hidden states are apart"
    )
    weight: float = Field(default=1.0, gt=0, description="weight of the hidden states")
    kd: float = Field(default=0.9, ge=0, description="weight of the distance of predictions")
    ce: float = Field(default=0.1, ge=0, description="weight of the surprise at the data")
    temperature: float = Field(
        default=1.0, gt=0, le=100, description="t: above 1 the teacher's unlikely tokens weigh more"
    )
    train: str | tuple[str, ...] = Field(
        default="all", description="`all`, `body` (all but embedding and head), or selectors of modules"
    )

    @model_validator(mode="after")
    def _names_layers_once(self) -> Self:
        told = {"map", "tail"} & self.model_fields_set
        if self.pairs and told:
            raise ValueError(f"pairs name the layers, and so does {min(told)}; leave one out")
        return self

    def compared(self, student: Model, teacher: Model) -> list[tuple[int, int]]:
        """Layers of the student and those of the teacher they are held to."""
        if self.pairs:
            return list(self.pairs)
        return matched(self.map, self.tail, student.layers, teacher.layers)

    def trains(self, model: Model) -> list[str]:
        return parameters(model, self.train)

    def refuses(self, model: Model, others: Sequence[Model]) -> Sequence[Diagnostic]:
        found = untrainable(self.kind, model, self.train)
        if not model.layers:
            return [*found, Diagnostic("E330", f"`{self.kind}` compares layers, and the student has none")]
        for teacher in others[-1:]:
            found += [*unlike_vocabularies(self.kind, model, teacher), *self._unlike(model, teacher)]
        return found

    def _unlike(self, student: Model, teacher: Model) -> list[Diagnostic]:
        """Layers that are not there, or streams of other widths."""
        kinds = {"student": student, "teacher": teacher}
        for name, model in kinds.items():
            numbers = [pair[name == "teacher"] for pair in self.pairs]
            odd = [n for n in numbers if not 0 <= n < model.layers]
            if odd:
                title = f"`pairs` of `{self.kind}` names layer {odd[0]} of the {name}"
                note = f"its layers are 0 to {model.layers - 1}"
                return [Diagnostic("E331", title, notes=(note,), about="pairs")]
        widths = {name: int(getattr(m.module("embedding"), "width", 0)) for name, m in kinds.items()}
        if widths["student"] != widths["teacher"]:
            title = f"`{self.kind}` compares streams of one width"
            note = f"the student's is {widths['student']}, the teacher's {widths['teacher']}"
            return [Diagnostic("E332", title, (), (note,), "use distill.logits", about="teacher")]
        return []

    def loss(self, student: Model, teachers: Mapping[str, Any], batch: Batch) -> Mapping[str, Tensor]:
        """hidden, kd, ce and their weighted sum."""
        teacher: Model = teachers["teacher"]
        pairs = self.compared(student, teacher)
        with torch.no_grad(), layer_outputs(teacher, sorted({t for _, t in pairs})) as theirs:
            told = teacher(batch.ids, step=batch.step)
        with layer_outputs(student, sorted({s for s, _ in pairs})) as mine:
            z, more = answered(student, batch)
        mask = batch.step.key_mask
        apart = torch.stack([distance(self.loss_, mine[s], theirs[t], mask) for s, t in pairs]).mean()
        kl = divergence("forward", self.temperature, 0.5)
        terms = [
            (self.kd, lambda z_s, labels, z_t: kl(z_s, z_t)),
            (self.ce, lambda z_s, labels, z_t: surprise(z_s, labels)),
        ]
        said, (kd, ce) = weighted(z, batch.labels != IGNORED, terms, batch.labels, told)
        found = total(said + self.weight * apart, more)
        return found | {"hidden": apart, "kd": kd, "ce": ce}

    def work(self, model: Model, seq: int = 0) -> Work:
        return training_work(self, model, seq, teachers=1, teacher=model)
