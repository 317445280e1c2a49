"""Train one model at several widths at once, so that any of them can be cut out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from effc.compiler.contract import TRAIN, Contract, Fact
from effc.compiler.layers import segments
from effc.compiler.losses import cross_entropy
from effc.compiler.method import Batch, Data, Work
from effc.compiler.model import Model
from effc.compiler.shapes import Train
from effc.compiler.trained import parameters, training_work
from effc.passes.adaptive._widths import Config, at_width, divided, unfit
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper
from effc.specs.units import Count, Share


class Slimmable(Train):
    """Train the model whole and at other widths in each step: width w is the first w of channels and heads.

    The lower `split` of the layers are the encoder, the others the decoder; a configuration is a width of
    each. Every step sums up the losses of the whole model, of its narrowest configuration (`sandwich`) and of
    `random` drawn ones, each with its own surprise and ci_kd |e - e'|^2 / |e'|^2, e what the encoder hands
    over and e' that of the whole model, held fixed, so that a decoder of any width goes with an encoder of
    any. The distance is not confirmed. Norms keep no statistics here, so widths share them; the stream
    between blocks keeps its width. The result is an ordinary model: adaptive.select cuts a width out.

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

    @model_validator(mode="after")
    def _has_the_whole(self) -> Self:
        for widths in (self.enc_widths or self.widths, self.dec_widths or self.widths):
            if max(widths) != 1 or min(widths) <= 0:
                raise ValueError(
                    "widths lie above 0% and have 100% among them: the model is trained whole too"
                )
        return self

    def configs(self) -> list[Config]:
        """All configurations, the narrowest first."""
        found = [(e, d) for e in self.enc_widths or self.widths for d in self.dec_widths or self.widths]
        return sorted(set(found), key=lambda c: (sum(c), c))

    def drawn(self, step: int) -> list[Config]:
        """Configurations beside the whole model that a step trains, by its number and torch's seed."""
        narrow = [c for c in self.configs() if c != (1.0, 1.0)]
        if not narrow:
            return []
        dice = torch.Generator().manual_seed((torch.initial_seed() + step) & (2**63 - 1))
        places = torch.randint(0, len(narrow), (self.random,), generator=dice).tolist()
        return list(dict.fromkeys([*(narrow[:1] if self.sandwich else ()), *(narrow[i] for i in places)]))

    def trains(self, model: Model) -> list[str]:
        return parameters(model)

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        return list(unfit(self.kind, model, sorted({w for c in self.configs() for w in c})))

    def loss(self, student: Model, teachers: Mapping[str, Any], batch: Batch) -> Mapping[str, Tensor]:
        whole, features = self._pass(student, batch, (1.0, 1.0))
        found, losses = {"whole": whole.detach()}, [whole]
        for config in self.drawn(batch.at):
            task, given = self._pass(student, batch, config)
            aim = features.detach().float()
            gap = F.mse_loss(given.float(), aim) / aim.square().mean().clamp(min=1e-12)
            losses.append(task + self.ci_kd * gap)
        return found | {"total": torch.stack(losses).mean()}

    def _pass(self, model: Model, batch: Batch, config: Config) -> tuple[Tensor, Tensor]:
        """The surprise of a configuration, and what its encoder hands to its decoder [B, T, d]."""
        encoder = divided(model, self.split)
        first = segments(model.gm.graph)[1][encoder].entry
        seen: list[Tensor] = []

        def enter(_: Any, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0])

        door = next(n for n in first.users if n.op == "call_module") if first is not None else None
        assert door is not None
        handle = model.module(str(door.target)).register_forward_pre_hook(enter)
        try:
            with at_width(model, config, encoder):
                z = model(batch.ids, step=batch.step)
        finally:
            handle.remove()
        return cross_entropy(z, batch.labels), seen[0]

    def measure(self, model: Model, data: Data) -> Mapping[str, Any]:
        """Surprise of each configuration on held-out text."""
        batch = data.batch("heldout", range(min(16, data.size("heldout"))))
        found = {}
        for config in self.configs():
            task, _ = self._pass(model, batch, config)
            found[f"{100 * config[0]:g}% {100 * config[1]:g}%"] = float(task)
        return {"widths": found}

    def work(self, model: Model, seq: int = 0) -> Work:
        return training_work(self, model, seq)
