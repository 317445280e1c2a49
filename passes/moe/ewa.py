"""Train several feed-forward networks in the place of one, and keep their mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, model_validator
from torch import nn

from effc.compiler.blocks.averaged import Averaged
from effc.compiler.blocks.mlp import MLP
from effc.compiler.contract import EXACT, Contract, Fact
from effc.compiler.method import Work
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Rewrite
from effc.passes.moe._ffn import exchanged, feed_forwards, parameter, replaced, unfit
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper


class Ewa(Rewrite):
    """Make E copies of each n-th feed-forward block; training deals tokens out to them, `finish` averages.

    In each training pass a random permutation gives every copy N / E of the N tokens, with no router; after
    each optimizer step W_i <- (1 - b) W_i + b / (E - 1) sum_{j != i} W_j, b = beta, or rising to it over the
    training when `ramp = linear`. Outside of training the block computes with the mean of its copies, so
    that no output depends on chance; `finish = average` stores that mean as a plain block, the same model.
    (The paper names neither its last b nor its ramp; both are arguments.)

    Use when: a training shall end better at no cost to inference, and its memory may grow.
    Costs:    E times the weights, gradients and optimizer state of these blocks until finished; as much work.
    """

    paper = Paper(
        "Experts Weights Averaging: A New General Training Scheme for Vision Transformers",
        arxiv="2308.06093",
        year=2023,
        section="3",
    )
    contract = Contract(
        EXACT,
        needs=(Fact("dense", "mlp"), Fact("ensemble").when(finish="average")),
        gives=(Fact("ensemble").when(finish="none"),),
        breaks=(Fact("ensemble").when(finish="average"),),
        keeps=tuple(Fact(name) for name in ("sparse", "sparse_2_4", "sparse_4_8", "unit_gain")),
    )
    examples = (
        "moe.ewa(experts = 4, every = 2)",
        "moe.ewa(experts = 2, every = 1, beta = 0.2, ramp = none)",
        "moe.ewa(finish = average)",
    )

    experts: int = Field(default=4, ge=2, le=4096, description="E: networks that train in the place of one")
    every: int = Field(default=2, ge=1, description="replace the n-th, 2n-th, ... block; 1: all of them")
    beta: float = Field(default=0.3, gt=0, lt=1, description="b: how far a step draws each to the others")
    ramp: Literal["linear", "none"] = Field(
        default="linear", description="whether b grows over the training or is beta from the start"
    )
    finish: Literal["none", "average"] = Field(
        default="none", description="average: put one block with the mean weights in place of the copies"
    )

    @model_validator(mode="after")
    def _does_not_overshoot(self) -> Self:
        limit = (self.experts - 1) / self.experts
        if self.beta >= limit:
            raise ValueError(
                f"beta is {self.beta:g}, and {self.experts} experts pass each other at {limit:.3g}; lower it"
            )
        return self

    def chosen(self, model: Model) -> list[str]:
        """Paths of the blocks that are replaced."""
        return feed_forwards(model)[self.every - 1 :: self.every]

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        if self.finish == "average":
            if _averaged(model):
                return []
            help_ = "make one first: moe.ewa(..., experts = 4), then train it"
            return [Diagnostic("E320", f"`{self.kind}` finds no networks to average", help=help_)]
        if found := _averaged(model):
            help_ = "finish it first: moe.ewa(..., finish = average)"
            notes = (f"{found[0]} holds {model.module(found[0]).n_experts} of them",)
            return [Diagnostic("E320", f"`{self.kind}` was applied to this model before", (), notes, help_)]
        blocks = feed_forwards(model)
        if self.every > len(blocks) > 0:
            title = f"there is no block number {self.every}, since the model has {len(blocks)}"
            return [Diagnostic("E331", title, help=f"use every = 1 to {len(blocks)}", about="every")]
        return unfit(self.kind, model, self.chosen(model), "copy")

    def rewrite(self, rw: Rewriter) -> None:
        with rw.together():
            if self.finish == "average":
                for path in _averaged(rw.model):
                    exchanged(rw, path, path.removesuffix("moe") + "mlp", _mean(rw.module(path)), "mean")
                return
            for path in self.chosen(rw.model):
                replaced(rw, path, self._copies(rw.module(path)), f"{self.experts} copies to train")

    def _copies(self, dense: MLP) -> Averaged:
        unit = Averaged(
            width=dense.width,
            hidden=dense.hidden,
            experts=self.experts,
            beta=self.beta,
            ramp=self.ramp == "linear",
            activation=dense.activation,
            gated=dense.gated,
            dtype=dense.dtype,
        )
        for name in ("gate", "up", "down") if dense.gated else ("up", "down"):
            weight: nn.Parameter = getattr(dense, name).weight
            if not weight.is_meta:
                copies = weight.detach().expand(self.experts, -1, -1).contiguous()
                getattr(unit.experts, name).weight = parameter(copies)
        return unit

    def work(self, model: Model, seq: int = 0) -> Work:
        nbytes = sum(t.numel() * t.element_size() for t in model.tensors().values())
        return Work(memory=nbytes * (self.experts if self.finish == "none" else 1))


def _averaged(model: Model) -> list[str]:
    return [path for path, unit in model.units() if isinstance(unit, Averaged)]


def _mean(unit: Averaged) -> MLP:
    plain = MLP(
        width=unit.width, hidden=unit.hidden, activation=unit.activation, gated=unit.gated, dtype=unit.dtype
    )
    for name in ("gate", "up", "down") if unit.gated else ("up", "down"):
        if not getattr(unit.experts, name).weight.is_meta:
            getattr(plain, name).weight = parameter(unit.mean(name).detach())
    return plain
