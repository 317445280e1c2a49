"""Give a mixture a dense gate that grows sharp in training, and leave out small weights afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from effc.compiler.blocks.moe import MoE
from effc.compiler.blocks.tempered import Gate, Tempered
from effc.compiler.contract import HEALED, Contract, Fact
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Rewrite
from effc.passes.moe._ffn import parameter
from effc.passes.moe._mixtures import mixtures_in, none_found
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper
from effc.specs.units import Share


class TemperatureGate(Rewrite):
    """Route by w = softmax(act(W x + b) / tau) over all experts; tau falls as the model trains.

    In a training stage tau = start (end / start)^(step / steps), so weights begin even and end sharp; outside
    of training it is `end`. Weights below `sparsify_at` are then left out and the others divided by their
    sum; the mass that goes is the error. With act = none tau and W say the same thing twice, which the theory
    calls slow to learn; a bent act parts them.

    Use when: a mixture shall learn by itself how many experts a token needs. Train it afterwards.
    Costs:    all experts run for each token in training, and those above `sparsify_at` later: what that saves
              depends on the text, so costs count all.
    """

    paper = Paper(
        "Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?",
        arxiv="2401.13875",
        year=2024,
        section="3",
    )
    contract = Contract(
        HEALED,
        needs=(Fact("mixture"),),
        gives=(Fact("mixture"),),
        keeps=tuple(Fact(name) for name in ("packed", "sparse", "sparse_2_4", "sparse_4_8", "unit_gain")),
    )
    examples = (
        "moe.temperature_gate()",
        "moe.temperature_gate(act = tanh, start = 1, end = 0.5, sparsify_at = 20%)",
    )

    act: Gate = Field(default="sigmoid", description="what bends the scores before the softmax")
    start: float = Field(default=2.0, gt=0, description="tau at the start of a training")
    end: float = Field(default=0.3, gt=0, description="tau at its end, and outside of training")
    form: Literal["exp"] = Field(default="exp", description="how tau falls: by equal factors")
    sparsify_at: Share = Field(
        default=0.05, ge=0, lt=1, description="weights below are left out, except in training; 0: none"
    )

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.end > self.start:
            raise ValueError(f"tau would rise from start = {self.start:g} to end = {self.end:g}; swap them")
        return self

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        if found := none_found(self.kind, model):
            return found
        if self.act == "none" and self.start != self.end:
            title = "a falling tau under act = none is learnt slowly: W can grow instead"
            return [
                Diagnostic(
                    "W331", title, (), (), "write act = sigmoid, or start = end", "warning", about="act"
                )
            ]
        return []

    def rewrite(self, rw: Rewriter) -> None:
        with rw.together():
            for path in mixtures_in(rw.model):
                rw.swap(path, self._gate(rw.module(path)), f"tau {self.start:g} to {self.end:g}")

    def _gate(self, old: MoE) -> Tempered:
        new = Tempered(
            width=old.width,
            hidden=old.hidden,
            experts=old.n_experts,
            act=self.act,
            start=self.start,
            tau=self.end,
            least=self.sparsify_at,
            activation=old.activation,
            gated=old.gated,
            balance=old.balance,
            scope=old.scope,
            pooled=old.pooled,
            dtype=old.dtype,
        )
        new.experts = old.experts
        new.router.weight = old.router.weight
        if not old.router.weight.is_meta:
            new.router.bias = parameter(torch.zeros(old.n_experts, dtype=old.router.weight.dtype))
        return new
