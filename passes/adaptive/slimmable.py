"""Train one model at several widths at once, so that any of them can be cut out of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from effc.compiler.contract import TRAIN, Contract, Fact
from effc.compiler.layers import segments
from effc.compiler.losses import IGNORED, cross_entropy
from effc.compiler.method import Batch, Data, Work
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Train
from effc.compiler.trace import TracedModel
from effc.compiler.trained import parameters, training_work
from effc.passes.adaptive._slim_fit import unfit as unfit_network
from effc.passes.adaptive._slim_net import Net, Widths, network, run, sketched, widen
from effc.passes.adaptive._slim_norm import SlimNorm
from effc.passes.adaptive._widths import Config, at_width, divided, unfit
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper
from effc.specs.units import Count, Share

IMAGES = 512
"""Held-out images that are looked at for the report."""


@dataclass(frozen=True, slots=True)
class Run:
    """A pass at a width: the loss [], what the encoder handed over, and the answers."""

    task: Tensor
    handed: tuple[Tensor, ...]
    answers: tuple[Tensor, ...]
    axis: int
    """That of channels and classes."""


Runs = Callable[[Widths], Run]


class Slimmable(Train):
    """Train the model whole and at other widths in each step: width w is the first w of channels and heads.

    A configuration is a width of the encoder and one of each decoder. In a traced network of convolutions a
    decoder is what one of several answers alone needs, the encoder the rest, and batch norms get statistics
    for each width; labels [B, tasks, ...] are classes, one of each answer. In a transformer the lower `split`
    of the layers are the encoder, norms keep no statistics and the stream keeps its width. Every step sums up
    the losses of the whole model, of its narrowest configuration (`sandwich`) and of `random` drawn ones,
    each with its own surprise, ci_kd |e - e'|^2 / |e'|^2 and out_kd KL(whole | own) of the answers, e what
    the encoder hands over and e' the same channels of the whole model, held fixed, so that a decoder of any
    width goes with an encoder of any. `distance = attention` compares sums over channels instead. Distance
    and weights are not confirmed. The result runs whole; adaptive.select cuts a width out.

    Use when: one training shall give models of several sizes.
    Costs:    a pass for each configuration in every step; the whole model learns a little less well.
    """

    paper = Paper(
        "Efficient Controllable Multi-Task Architectures", arxiv="2308.11744", year=2023, section="3"
    )
    contract = Contract(TRAIN, needs=(Fact("dense", "model"),), keeps=(Fact("dense", "model"),))
    examples: ClassVar[tuple[str, ...]] = (
        "adaptive.slimmable(data = code, widths = [50%, 100%], steps = 2, batch = 2)",
        "adaptive.slimmable(data = code, enc_widths = [50%, 100%], dec_widths = [100%], steps = 2)",
    )

    widths: tuple[Share, ...] = Field(
        default=(0.5, 1.0), min_length=1, description="widths that the model is trained at, 100% among them"
    )
    enc_widths: tuple[Share, ...] = Field(default=(), description="those of the encoder; default: `widths`")
    dec_widths: tuple[Share, ...] = Field(default=(), description="those of the decoder; default: `widths`")
    split: Share = Field(default=0.5, gt=0, lt=1, description="share of the layers that are the encoder")
    sandwich: bool = Field(default=True, description="train the narrowest configuration in every step")
    random: Count = Field(default=2, description="further configurations of a step, drawn")
    ci_kd: float = Field(default=1.0, ge=0, description="weight of what the encoder hands over")
    out_kd: float = Field(default=0.0, ge=0, description="weight of the answers of the whole model")
    distance: Literal["l2", "attention"] = Field(
        default="l2", description="how what is handed over is compared: by number, or by its size at a place"
    )
    tasks: tuple[float, ...] = Field(
        default=(), description="weights of the answers of a traced network, in their order; default: equal"
    )

    @model_validator(mode="after")
    def _has_the_whole(self) -> Self:
        for widths in (self.enc_widths or self.widths, self.dec_widths or self.widths):
            if max(widths) != 1 or min(widths) <= 0:
                raise ValueError(
                    "widths lie above 0% and have 100% among them: the model is trained whole too"
                )
        if self.tasks and (min(self.tasks) < 0 or sum(self.tasks) == 0):
            raise ValueError("weights of tasks are not negative, and one of them is above 0")
        return self

    def configs(self) -> list[Config]:
        """All configurations of a transformer, the narrowest first."""
        found = [(e, d) for e in self.enc_widths or self.widths for d in self.dec_widths or self.widths]
        return sorted(set(found), key=lambda c: (sum(c), c))

    def of(self, model: Model) -> list[Widths]:
        """All configurations of a model, the narrowest first."""
        if not isinstance(model, TracedModel):
            return list(self.configs())
        return network(model).all(self.enc_widths or self.widths, self.dec_widths or self.widths)

    def drawn(self, step: int, configs: Sequence[Widths] | None = None) -> list[Widths]:
        """Configurations beside the whole model that a step trains, by its number and torch's seed."""
        narrow = [c for c in configs or self.configs() if min(c) < 1]
        if not narrow:
            return []
        dice = torch.Generator().manual_seed((torch.initial_seed() + step) & (2**63 - 1))
        places = torch.randint(0, len(narrow), (self.random,), generator=dice).tolist()
        return list(dict.fromkeys([*(narrow[:1] if self.sandwich else ()), *(narrow[i] for i in places)]))

    def trains(self, model: Model) -> list[str]:
        return parameters(model)

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        if not isinstance(model, TracedModel):
            return list(unfit(self.kind, model, sorted({w for c in self.configs() for w in c})))
        if any(isinstance(m, SlimNorm) for m in model.gm.modules()):
            note = "its norms have statistics for several widths"
            return [Diagnostic("E325", "the network was trained at several widths already", (), (note,))]
        answers = network(model).answers
        if self.tasks and len(self.tasks) != answers:
            title = f"`tasks` has {len(self.tasks)} weights for {answers} answers of the network"
            return [Diagnostic("E331", title, help="give one weight for each answer", about="tasks")]
        widths = self.enc_widths or self.widths, self.dec_widths or self.widths
        return list(unfit_network(self.kind, model, *widths))

    def outline(self, rw: Rewriter, others: Sequence[Model]) -> None:
        if isinstance(rw.model, TracedModel):
            widen(rw, network(rw.model), self.of(rw.model))

    def loss(self, student: Model, teachers: Mapping[str, Any], batch: Batch) -> Mapping[str, Tensor]:
        if isinstance(student, TracedModel):
            return self._loss_of(partial(self._answers, student, network(student), batch), student, batch)
        return self._loss_of(partial(self._logits, student, batch), student, batch)

    def _loss_of(self, runs: Runs, model: Model, batch: Batch) -> Mapping[str, Tensor]:
        configs = self.of(model)
        norms = [m for m in model.gm.modules() if isinstance(m, SlimNorm)]
        for norm in norms:
            norm.train()
        whole = runs(configs[-1])
        found, losses = {"whole": whole.task.detach()}, [whole.task]
        for widths in self.drawn(batch.at, configs):
            one = runs(widths)
            gaps = [self._gap(e, aim, one.axis) for e, aim in zip(one.handed, whole.handed, strict=True)]
            losses.append(one.task + self.ci_kd * torch.stack(gaps).mean())
            if self.out_kd:
                told = [_told(z, y, one.axis) for z, y in zip(one.answers, whole.answers, strict=True)]
                losses[-1] = losses[-1] + self.out_kd * torch.stack(told).mean()
        for norm in norms:
            norm.eval()
        return found | {"total": torch.stack(losses).mean()}

    def _gap(self, given: Tensor, aim: Tensor, axis: int) -> Tensor:
        """How far what the encoder hands over is from the same of the whole model; channels may be fewer."""
        goal, own = aim.detach().float(), given.float()
        if self.distance == "attention":
            maps = [t.square().mean(axis).flatten(1) for t in (own, goal)]
            own, goal = (m / m.norm(dim=1, keepdim=True).clamp(min=1e-12) for m in maps)
        else:
            goal = goal.narrow(axis, 0, own.shape[axis])
        return F.mse_loss(own, goal) / goal.square().mean().clamp(min=1e-12)

    def _answers(self, model: TracedModel, net: Net, batch: Batch, widths: Widths) -> Run:
        """What a network answers at a width."""
        answers, handed = run(model, net, widths, batch.ids)
        labels = [batch.labels] if net.answers == 1 else list(batch.labels.unbind(1))
        weights = torch.tensor(self.tasks or (1.0,) * net.answers)
        each = [
            F.cross_entropy(z.float(), y, ignore_index=IGNORED) for z, y in zip(answers, labels, strict=True)
        ]
        task = (torch.stack(each) * weights).sum() / weights.sum()
        return Run(task, tuple(handed[name] for name in net.border), tuple(answers), 1)

    def _logits(self, model: Model, batch: Batch, config: Widths) -> Run:
        """What a transformer answers at a width; its encoder hands [B, T, d] to its decoder."""
        encoder = divided(model, self.split)
        first = segments(model.gm.graph)[1][encoder].entry
        seen: list[Tensor] = []

        def enter(_: Any, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0])

        door = next(n for n in first.users if n.op == "call_module") if first is not None else None
        assert door is not None
        handle = model.module(str(door.target)).register_forward_pre_hook(enter)
        try:
            with at_width(model, (config[0], config[1]), encoder):
                z = model(batch.ids, step=batch.step)
        finally:
            handle.remove()
        return Run(cross_entropy(z, batch.labels), (seen[0],), (z,), -1)

    def measure(self, model: Model, data: Data) -> Mapping[str, Any]:
        """On held-out data: the surprise of each configuration; of a network, how often answers are right."""
        traced = isinstance(model, TracedModel)
        batch = data.batch("heldout", range(min(IMAGES if traced else 16, data.size("heldout"))))
        found, right = {}, {}
        for widths in self.of(model):
            name = " ".join(f"{100 * w:g}%" for w in widths)
            if isinstance(model, TracedModel):
                one = self._answers(model, net := network(model), batch, widths)
                labels = [batch.labels] if net.answers == 1 else list(batch.labels.unbind(1))
                hits = zip(one.answers, labels, strict=True)
                right[name] = [float((z.argmax(1) == y).double().mean()) for z, y in hits]
            else:
                one = self._logits(model, batch, widths)
            found[name] = float(one.task)
        return {"widths": found, **({"right": right} if right else {})}

    def work(self, model: Model, seq: int = 0) -> Work:
        work = training_work(self, model, seq)
        if not isinstance(model, TracedModel):
            return work
        flops = sketched(model, network(model), self.of(model)[-1]).flops
        passes = 1 + self.random + self.sandwich
        return work + Work(flops=3.0 * self.steps * self.batch * flops * passes)


def _told(z: Tensor, y: Tensor, axis: int) -> Tensor:
    """KL of what the whole model answers, y held fixed, from an own answer z; classes along the axis."""
    goal, own = y.detach().float().log_softmax(axis), z.float().log_softmax(axis)
    return (goal.exp() * (goal - own)).sum(axis).mean()
