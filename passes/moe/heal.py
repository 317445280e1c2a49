"""Train a carved model by turns: its router on what the dense model fires, its experts on text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from effc.compiler.auxiliary import answered
from effc.compiler.blocks.carved import Carved
from effc.compiler.contract import TRAIN, Contract, Fact
from effc.compiler.losses import cross_entropy
from effc.compiler.method import Batch, DataRef, ModelRef, Work
from effc.compiler.model import Model
from effc.compiler.shapes import Train
from effc.compiler.trained import parameters, training_work, untrainable
from effc.passes.moe._slices import members, overlap
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper


class Heal(Train):
    """Train the router for `router_steps`, all other weights for `expert_steps`, and so on by turns.

    Router: in each layer o_e is how much of a token's strongest channels, in the dense model, expert e has
    (at 1, .8, .6, .4 and .2 of its size); s = softmax(10 (o - mean o)). Its loss is .75 CE(argmax s), with
    smoothing .5, + .25 CE(s), summed over layers. Experts: -log p(next token), each token through the expert
    that the router names.

    Use when: after moe.carve.
    Costs:    as adapt.full in the turns of experts; in those of the router a forward pass of the dense model
              and three of the router.
    """

    paper = Paper(
        "Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System Co-Design",
        arxiv="2410.19123",
        year=2024,
        section="3",
    )
    contract = Contract(TRAIN, needs=(Fact("carved"),))
    examples: ClassVar[tuple[str, ...]] = (
        "moe.heal(dense = base, data = [code, prose], steps = 4, batch = 2, router_steps = 1)",
    )

    data: tuple[DataRef, ...] = Field(min_length=1, description="training sequences, mixed")  # type: ignore[assignment]
    dense: ModelRef = Field(description="the model that was carved")
    router_steps: int = Field(default=100, ge=1, description="steps of a turn of the router")
    expert_steps: int = Field(default=200, ge=1, description="steps of a turn of everything else")
    sharpness: float = Field(default=10.0, gt=0, description="10 in s = softmax(10 (o - mean o))")
    hard: float = Field(default=0.75, ge=0, le=1, description="weight of the expert with the largest overlap")
    smoothing: float = Field(default=0.5, ge=0, lt=1, description="smoothing of that part's labels")

    def trains(self, model: Model) -> list[str]:
        return parameters(model)

    def refuses(self, model: Model, others: Sequence[Model]) -> Sequence[Diagnostic]:
        carved = _carved(model)
        if not carved:
            title = f"`{self.kind}` trains what moe.carve made, and this model has no carved block"
            return [Diagnostic("E320", title, help="carve it first, or train it with adapt.full")]
        for dense in others[-1:]:
            lost = [path for path in carved if not _has(dense, _down(path))]
            if lost:
                note = f"it has no {_down(lost[0])}, whose channels {lost[0]} is made of"
                title = f"`dense` of `{self.kind}` is not the model that was carved"
                return [Diagnostic("E332", title, notes=(note,), about="dense")]
        return untrainable(self.kind, model)

    def turn(self, step: int) -> str:
        """Whose turn a step is."""
        return "router" if step % (self.router_steps + self.expert_steps) < self.router_steps else "experts"

    def loss(self, student: Model, teachers: Mapping[str, Any], batch: Batch) -> Mapping[str, Tensor]:
        """The loss whose turn it is; the other is 0."""
        if self.turn(batch.at) == "router":
            found = self._routing(student, teachers["dense"], batch)
            return {"total": found, "router": found, "experts": torch.zeros_like(found)}
        z, _ = answered(student, batch)
        found = cross_entropy(z, batch.labels)
        return {"total": found, "router": torch.zeros_like(found), "experts": found}

    def _routing(self, student: Model, dense: Model, batch: Batch) -> Tensor:
        with torch.no_grad():
            x = student.module("embedding")(batch.ids, batch.step)
            targets = self.targets(student, dense, batch)
        scores = student.module("router").scores(x, batch.step).float().flatten(0, 1)  # type: ignore[operator]
        real = batch.step.key_mask
        keep = slice(None) if real is None else real.flatten()
        terms = [
            self.hard * F.cross_entropy(scores[keep], s[keep].argmax(-1), label_smoothing=self.smoothing)
            + (1 - self.hard) * F.cross_entropy(scores[keep], s[keep])
            for s in targets
        ]
        return torch.stack(terms).sum()

    def targets(self, student: Model, dense: Model, batch: Batch) -> list[Tensor]:
        """For each carved block s [N, E], from what fires in the dense model."""
        fired: dict[str, Tensor] = {}

        def see(path: str) -> torch.utils.hooks.RemovableHandle:
            return dense.module(_down(path)).register_forward_pre_hook(
                lambda _, args: fired.__setitem__(path, args[0].flatten(0, -2))
            )

        handles = [see(path) for path in _carved(student)]
        try:
            dense(batch.ids, step=batch.step)
        finally:
            for handle in handles:
                handle.remove()
        found = []
        for path, unit in _carved(student).items():
            o = overlap(fired[path].float(), members(unit, fired[path].shape[-1]).to(fired[path].device))
            found.append((self.sharpness * (o - o.mean(-1, keepdim=True))).softmax(-1))
        return found

    def work(self, model: Model, seq: int = 0) -> Work:
        return training_work(self, model, seq, teachers=1, teacher=model)


def _carved(model: Model) -> dict[str, Carved]:
    return {path: unit for path, unit in model.units() if isinstance(unit, Carved)}


def _down(path: str) -> str:
    """The linear of the dense model that reads the channels of a carved block."""
    return path.removesuffix("moe") + "mlp.down"


def _has(model: Model, path: str) -> bool:
    try:
        model.module(path)
    except AttributeError:
        return False
    return True
