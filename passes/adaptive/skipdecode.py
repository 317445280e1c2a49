"""Run fewer layers the further a text goes on: a depth for each position, falling from the first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from effc.compiler.blocks.schedule import Schedule
from effc.compiler.contract import EXACT, HEALED, Contract, Fact
from effc.compiler.model import Model
from effc.compiler.ops_adaptive import depths
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Rewrite
from effc.passes.adaptive._layers import KEPT, skipping, unfit
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper
from effc.specs.units import Count, Share


class SkipDecode(Rewrite):
    """Run n(t) = round(max - (max - min) min(t / horizon, 1)) layers for the token at position t.

    Of these the first `warmup` layers and the last n(t) - warmup: sets that only shrink as t grows, so that
    every key and value that a layer reads was made by it. A layer that no longer runs stores none. Every row
    of a batch goes by its own positions. `prompt = full`: what is read at once runs max layers, as in the
    paper, and the positions behind it go by the schedule; `scheduled`: it goes by the schedule too, as in
    training. `max_layers` and `min_layers` are numbers of layers, or shares of those that there are.

    Use when: long texts are generated in batches, where tokens that exit each for itself save nothing.
    Costs:    quality, until the model is fine-tuned with the schedule in place (adapt.full); the prompt
              saves nothing. FLOPs are those of the mean over the first `horizon` positions.
    """

    paper = Paper(
        "SkipDecode: Autoregressive Skip Decoding with Batching and Caching for Efficient LLM Inference",
        arxiv="2307.02628",
        year=2023,
        section="3",
    )
    contract = Contract(
        EXACT.when(HEALED, max_layers=1.0, min_layers=1.0), keeps=tuple(Fact(name, "model") for name in KEPT)
    )
    examples = (
        "adaptive.skipdecode(max_layers = 6, min_layers = 3, horizon = 8)",
        "adaptive.skipdecode(min_layers = 50%, warmup = 2, horizon = 16, prompt = scheduled)",
        "adaptive.skipdecode(max_layers = 100%, min_layers = 100%)",
    )

    max_layers: Share | Count = Field(
        default=1.0, gt=0, description="layers at the first position: a share of those there are, or a number"
    )
    min_layers: Share | Count = Field(
        default=0.25, gt=0, description="layers from position `horizon` on: a share, or a number"
    )
    warmup: int = Field(default=1, ge=0, description="layers from the first on that always run")
    decay: Literal["linear"] = Field(default="linear", description="how n falls between the two")
    horizon: int = Field(default=256, ge=1, description="position at which n has come down to the least")
    prompt: Literal["full", "scheduled"] = Field(
        default="full", description="whether a prompt runs max_layers or goes by the schedule"
    )

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if type(self.max_layers) is type(self.min_layers) and self.min_layers > self.max_layers:
            told = f"min_layers {self.min_layers:g} is above max_layers {self.max_layers:g}"
            raise ValueError(f"{told}: a token may only run where all before it did")
        return self

    def depth(self, layers: int) -> tuple[int, int]:
        """The largest and the least n(t) of a model of so many layers."""
        return _number(self.max_layers, layers), _number(self.min_layers, layers)

    def least(self, layer: int, layers: int) -> int:
        """The n(t) from which on a layer runs."""
        return 0 if layer < self.warmup else layers - layer + self.warmup

    def reach(self, layer: int, layers: int) -> int | None:
        """At how many positions a layer runs; None: at all."""
        most, fewest = self.depth(layers)
        least = self.least(layer, layers)
        if least <= fewest:
            return None
        return int((depths(torch.arange(self.horizon), most, fewest, self.horizon) >= least).sum())

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        if found := list(unfit(self.kind, model)):
            return found
        layers = model.layers
        most, fewest = self.depth(layers)
        if most > layers:
            title = f"`max_layers` {most} is above the {layers} layers of the model"
            return [Diagnostic("E331", title, help=f"use at most {layers}, or a share", about="max_layers")]
        if fewest > most:
            title = f"n(t) would rise from {most} to {fewest} layers"
            note = "then a layer would read keys that earlier positions never made"
            help_ = f"use a min_layers of at most {most}"
            return [Diagnostic("E325", title, notes=(note,), help=help_, about="min_layers")]
        if fewest < self.warmup + 1:
            title = f"`min_layers` {fewest} leaves no layer behind the {self.warmup} that always run"
            help_ = f"use at least {self.warmup + 1}, or a warmup of {max(0, fewest - 1)}"
            return [Diagnostic("E331", title, help=help_, about="min_layers")]
        return []

    def rewrite(self, rw: Rewriter) -> None:
        layers = rw.model.layers
        most, fewest = self.depth(layers)
        whole = self.prompt == "full"
        schedule = Schedule(most=most, least=fewest, horizon=self.horizon, prompt=whole)
        rw.insert("schedule", schedule, after="embedding")
        with rw.together():
            for layer in range(layers):
                reach = self.reach(layer, layers)
                if reach is not None:
                    least = self.least(layer, layers)
                    skipping(rw, layer, least=least, fill=False, reach=reach, horizon=self.horizon)


def _number(layers: float, of: int) -> int:
    """Layers out of a share or a number, halves up."""
    return layers if isinstance(layers, int) else max(1, int(layers * of + 0.5))
