"""Set how a mixture chooses among its experts: how many, with which weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from effc.compiler.contract import HEALED, Contract, Fact
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Rewrite
from effc.passes.moe._mixtures import changes, mixtures_in, none_found, reset, unchanged
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import FOLKLORE


class TopK(Rewrite):
    """Let a token run through the k experts with the largest z = W x; of equal ones the lower number wins.

    topk_softmax:  w = softmax of the k largest z
    softmax_topk:  p = softmax(z), w_e = p_e of the k largest, divided by their sum when `renorm`

    Both are the same with `renorm`; without it outputs shrink by the mass that is left out. `jitter` scales
    the router's inputs by random numbers in 1 +- jitter, in training alone.

    Use when: a mixture shall do more or less work a token than it was trained for, and is trained afterwards.
    Costs:    k of E experts run for each token; stored bytes stay as they are.
    """

    paper = FOLKLORE
    contract = Contract(
        HEALED,
        needs=(Fact("mixture"),),
        gives=(Fact("mixture"),),
        keeps=tuple(Fact(name) for name in ("packed", "sparse", "sparse_2_4", "sparse_4_8", "unit_gain")),
    )
    examples = (
        "moe.top_k(k = 1)",
        "moe.top_k(k = 3, order = softmax_topk, renorm = false, jitter = 0.01)",
    )

    k: int = Field(default=2, ge=1, description="experts that a token runs through")
    order: Literal["topk_softmax", "softmax_topk"] = Field(
        default="topk_softmax", description="whether the softmax is taken over the k largest or over all"
    )
    renorm: bool = Field(default=True, description="divide the weights of the k experts by their sum")
    jitter: float = Field(default=0.0, ge=0, lt=1, description="random scaling of the router's inputs")

    @model_validator(mode="after")
    def _sums_to_one(self) -> Self:
        if self.order == "topk_softmax" and not self.renorm:
            raise ValueError(
                "renorm = false needs order = softmax_topk; a softmax of the k largest sums to one"
            )
        return self

    @property
    def wanted(self) -> dict[str, Any]:
        """The arguments of the blocks."""
        return {"active": self.k, "renormalize": self.renorm, "jitter": self.jitter}

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        if found := none_found(self.kind, model):
            return found
        fewest = min(unit.n_experts for unit in mixtures_in(model).values())
        if self.k > fewest:
            title = f"`k` is {self.k}, and a mixture of the model has {fewest} experts"
            return [Diagnostic("E331", title, help=f"use k = {fewest} or less", about="k")]
        if found := unchanged(self.kind, model, self.wanted):
            return found
        if self.k == 1 and self.renorm:
            title = "a router that chooses one expert with weight one gets no gradient"
            help_ = "for training, write order = softmax_topk and renorm = false"
            return [Diagnostic("W331", title, (), (), help_, "warning", about="k")]
        return []

    def rewrite(self, rw: Rewriter) -> None:
        reset(rw, changes(rw.model, self.wanted), self.wanted, f"{self.k} experts a token")
