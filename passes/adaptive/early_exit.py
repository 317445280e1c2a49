"""Let tokens leave between layers: heads that answer early, and gates that learn with them when to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from effc.compiler.blocks.exit import GAIN, Answers, Exit
from effc.compiler.blocks.linear import Linear
from effc.compiler.blocks.norm import Norm
from effc.compiler.contract import TRAIN, Contract, Fact
from effc.compiler.layers import segments
from effc.compiler.losses import IGNORED
from effc.compiler.method import Batch, Data, Work
from effc.compiler.model import Model
from effc.compiler.presence import loaded
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Train
from effc.compiler.trained import parameters, training_work, untrainable
from effc.passes.adaptive._exits import chances, costs, exits_in, left, taps, targets
from effc.passes.adaptive._layers import KEPT, skipping, skipping_head, unfit
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper
from effc.specs.units import Count

CLOSED = -4.0
"""Bias of a fresh gate: sigmoid(-4) = 0.018, so nobody leaves before it is trained."""


class EarlyExit(Train):
    """Put a head and a gate behind every n-th layer, and train both: a token leaves where its gate says so.

    z_l = head_l(norm_l(x_l)), g_l = sigmoid(16 (w f(z_l) + b)) with f: largest p, entropy, margin of the two
    largest, entropy of p sharpened. P_l = max(0, min(g_l, 1 - sum_{j<l} g_j)), the rest goes to the last
    head. After a warm-up, in which head l of G weighs G - l, two turns of `switch_every` steps alternate:
    heads by sum_l P_l CE_l, of each token rescaled to sum_l CE_l; gates by binary cross-entropy to "1 from
    l* = argmin_l CE_l + lambda cost_l on", both answers weighing alike. cost_l is the share of the model's
    FLOPs up to there. A token leaves at the first l with P_l / (1 - sum_{j<l} P_j) >= `threshold`; layers
    behind take keys and values from its stream as it is. (How the paper sharpens is not confirmed:
    `power`. The factor 16 is effc's, so that gates move as fast as heads by steps of one size.)

    Use when: many tokens are easy, and a token may cost what it needs.
    Costs:    d V weights and their work for each exit (heads = shared: no weights); keys and values of all
              layers are kept for every token. FLOPs in a plan are those of a token that never leaves;
              `spent(data)` counts what is done.
    """

    paper = Paper(
        "Jointly-Learned Exit and Inference for a Dynamic Neural Network: JEI-DNN",
        arxiv="2310.09163",
        year=2023,
        section="4",
    )
    contract = Contract(TRAIN, keeps=tuple(Fact(name, "model") for name in KEPT))
    examples: ClassVar[tuple[str, ...]] = (
        "adaptive.early_exit(data = code, every = 2, steps = 4, batch = 2, warmup = 2, switch_every = 1)",
        "adaptive.early_exit(data = code, every = 3, heads = shared, freeze_backbone = false, steps = 2)",
    )

    every: int = Field(default=2, ge=1, description="layers from one exit to the next")
    heads: Literal["own", "shared"] = Field(
        default="own",
        description="whether an exit has a head of its own, or the model's behind a norm of its own",
    )
    lambda_cost: float = Field(
        default=0.7, ge=0, description="nats that going through the whole model must save, to be worth it"
    )
    warmup: Count = Field(default=100, description="steps of the heads alone, before gates are trained")
    switch_every: int = Field(default=200, ge=1, description="steps of a turn of heads or gates")
    threshold: float = Field(default=0.5, gt=0, le=1, description="chance from which on a token leaves")
    power: float = Field(default=2.0, gt=1, description="how much the last feature of a gate is sharpened")
    freeze_backbone: bool = Field(default=True, description="train exits alone, not the model they stand in")

    def places(self, model: Model) -> list[int]:
        """Layers behind which there is an exit."""
        return list(range(self.every - 1, model.layers - 1, self.every))

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        return list(unfit(self.kind, model)) or list(self._unfit(model))

    def _unfit(self, model: Model) -> Iterator[Diagnostic]:
        if not self.places(model):
            title = f"an exit every {self.every} layers leaves none before the last of {model.layers}"
            help_ = f"use every = {model.layers - 1} or less" if model.layers > 1 else "use a deeper model"
            yield Diagnostic("E331", title, help=help_, about="every")
        norm = dict(model.gm.named_children()).get("norm")
        if not isinstance(norm, Norm):
            note = "exits begin as copies of the norm and head behind the last layer"
            yield Diagnostic("E320", f"`{self.kind}` finds no norm before the head", notes=(note,))
        elif type(model.module("head")) is not Linear:
            kind = type(model.module("head")).__name__
            help_ = "put this stage before the one that changed the head"
            yield Diagnostic("E323", f"`{self.kind}` copies the head, and it is {kind}", help=help_)
        if not self.freeze_backbone:
            yield from untrainable(self.kind, model)

    def outline(self, rw: Rewriter, others: Sequence[Model]) -> None:
        places = self.places(rw.model)
        ends = {i: str(s.exit) for i, s in enumerate(segments(rw.model.gm.graph)[1])}
        for number, layer in enumerate(places):
            rw.insert(f"layers.{layer}.exit", self._exit(rw, number), after=ends[layer])
        with rw.together():
            for layer in range(places[0] + 1, rw.model.layers):
                skipping(rw, layer, least=1, fill=True)
            skipping_head(rw)
        rw.insert("answers", Answers(), after="head")

    def _exit(self, rw: Rewriter, number: int) -> Exit:
        norm, head = rw.module("norm"), rw.module("head")
        unit = Exit(
            width=norm.width,
            classes=head.out_features,
            number=number,
            threshold=self.threshold,
            power=self.power,
            eps=norm.eps,
            form=norm.form,
            norm_bias=norm.bias is not None,
            offset=norm.offset,
            bias=head.bias is not None,
            dtype=head.dtype,
        )
        if self.heads == "shared":
            unit.head._parameters.update(head._parameters)
        return unit

    def begin(self, rw: Rewriter, seed: int) -> None:
        """Norms and heads begin as those of the model, gates closed."""
        sources = {name: loaded(rw.model, name) for name in ("norm", "head")}
        for path, unit in exits_in(rw.model).items():
            for name, source in sources.items():
                for slot, tensor in source.named_parameters():
                    if name == "norm" or self.heads == "own":
                        rw.write(f"{path}.{name}", slot, tensor.detach().clone())
            dtype = unit.gate.weight.dtype
            rw.write(f"{path}.gate", "weight", torch.zeros(1, 4, dtype=dtype))
            rw.write(f"{path}.gate", "bias", torch.full((1,), CLOSED / GAIN, dtype=dtype))

    def trains(self, model: Model) -> list[str]:
        if not self.freeze_backbone:
            return parameters(model)
        names = ("norm", "gate") if self.heads == "shared" else ("norm", "gate", "head")
        found = [
            f"{path}.{name}.{slot}"
            for path, unit in exits_in(model).items()
            for name in names
            for slot, _ in unit.get_submodule(name).named_parameters()
        ]
        return found

    def turn(self, step: int) -> str:
        """What a step trains: `warmup`, `gates` or `heads`."""
        if step < self.warmup:
            return "warmup"
        return "heads" if (step - self.warmup) // self.switch_every % 2 else "gates"

    def loss(self, student: Model, teachers: Mapping[str, Any], batch: Batch) -> Mapping[str, Tensor]:
        keep = batch.labels != IGNORED
        labels = batch.labels[keep]
        logits, last = taps(student, batch.ids, batch.step, keep)
        surprise = [F.cross_entropy(z.float(), labels, reduction="none") for z in (*logits, last)]
        found = {f"exit{i}": ce.mean().detach() for i, ce in enumerate(surprise)}
        turn = self.turn(batch.at)
        if turn == "warmup":
            weights = torch.arange(len(surprise), 0, -1.0)
            means = torch.stack([ce.mean() for ce in surprise])
            return found | {"total": (weights / weights.sum() * means).sum()}
        units = list(exits_in(student).values())
        if turn == "heads":
            with torch.no_grad():
                share = chances([u.gates(z) for u, z in zip(units, logits, strict=True)])
            ce = torch.stack(surprise)
            mixed = (share * ce).sum(0)
            scale = (ce.sum(0) / mixed.clamp(min=1e-6)).detach()
            return found | {"total": (scale * mixed).mean()}
        gates = torch.stack([u.gates(z.detach()) for u, z in zip(units, logits, strict=True)])
        due = targets(torch.stack(surprise).detach(), costs(student), self.lambda_cost)
        return found | {"total": _balanced(gates, due)}

    def measure(self, model: Model, data: Data) -> Mapping[str, Any]:
        """On held-out text: where tokens leave, layers they run, and FLOPs a token, counted and by P."""
        return left(model, data)

    def work(self, model: Model, seq: int = 0) -> Work:
        return training_work(self, model, seq)


def _balanced(gates: Tensor, due: Tensor) -> Tensor:
    """Binary cross-entropy of gates [G, N] to due [G, N] of 0 and 1, in which either answer of an exit weighs
    a half.
    """
    ones = due.sum(1, keepdim=True).clamp(min=1)
    zeros = (1 - due).sum(1, keepdim=True).clamp(min=1)
    weights = torch.where(due > 0, 0.5 / ones, 0.5 / zeros)
    loss = F.binary_cross_entropy(gates.clamp(1e-6, 1 - 1e-6), due, reduction="none")
    return (weights * loss).sum(1).mean()
