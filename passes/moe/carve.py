"""Carve a dense model into experts: slices of its feed-forward blocks, one for each domain of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from effc.compiler.blocks.carved import Carved
from effc.compiler.blocks.mlp import MLP
from effc.compiler.blocks.pre_gate import PreGate
from effc.compiler.contract import EXACT, HEALED, Contract, Fact
from effc.compiler.cost import count
from effc.compiler.method import DataRef, Work
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Statistic, Survey
from effc.passes.moe._ffn import feed_forwards, parameter, replaced, seeded, unfit
from effc.passes.moe._slices import Fires, sliced, slices
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper
from effc.specs.units import Count, Share


class Carve(Survey):
    """Keep of each feed-forward block the channels that a domain fires most, an expert for each domain.

    S_i(c) = mean |a_c| of the input of `down` on domain i, over its mean over channels. The common part R is
    the m_R channels with the largest mean S, expert i the m - m_R others with the largest S_i; m = keep f,
    m_R = shared m. A token runs through FFN[R] + FFN[expert]: slices of rows of gate and up and columns of
    down. Which expert, the same in all layers, says one small causal router over the embeddings of the
    tokens, known before the first layer: W [r, d], a layer of width r, a head [E, r]. It starts at random.
    (The paper takes for R what all experts have in common, so that its size is known after the fact only, and
    gives the router a table of its own.)

    Use when: several domains of text are known, and each shall run through a part of the weights; train with
              moe.heal afterwards.
    Costs:    (shared + E (1 - shared)) keep f channels to store instead of f, keep f of them run for a token;
              one pass over the samples of each domain.
    """

    paper = Paper(
        "Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System Co-Design",
        arxiv="2410.19123",
        year=2024,
        section="3",
    )
    contract = Contract(
        EXACT.when(HEALED, keep=1.0),
        needs=(Fact("dense", "mlp"),),
        gives=(Fact("carved"),),
        keeps=(Fact("unit_gain"),),
    )
    examples = (
        "moe.carve(data = [code, prose], keep = 50%, router_width = 16, router_heads = 2)",
        "moe.carve(data = [code, prose, code.heldout], keep = 24, shared = 75%, router_heads = 4)",
        "moe.carve(data = [code, prose], keep = 100%, shared = 25%, router_width = 16)",
    )

    data: tuple[DataRef, ...] = Field(min_length=2, description="text of each domain, an expert for each")
    keep: Share | Count = Field(
        default=0.5, gt=0, description="channels of a block that a token runs through: a share, or a number"
    )
    shared: Share = Field(
        default=0.5, ge=0, le=1, description="share of them that all experts have in common"
    )
    router_width: int = Field(default=128, ge=1, description="r: width of the router's one layer")
    router_heads: int = Field(default=2, ge=1, description="heads of its attention")

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.router_width % (2 * self.router_heads):
            told = f"router_width {self.router_width} does not divide into {self.router_heads} heads"
            raise ValueError(f"{told} of even width")
        if len(set(self.data)) < len(self.data):
            raise ValueError("data names the same domain twice, which would make two equal experts")
        return self

    def sizes(self, hidden: int) -> tuple[int, int]:
        """m_R and m - m_R for a block of f channels."""
        kept = min(hidden, self.keep) if isinstance(self.keep, int) else int(self.keep * hidden + 0.5)
        common = int(self.shared * kept + 0.5)
        return common, kept - common

    def watched(self, model: Model) -> list[str]:
        return [f"{path}.down" for path in feed_forwards(model)]

    def start(self, rw: Rewriter, path: str) -> Statistic:
        return Fires(rw.module(path).in_features)

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        paths = feed_forwards(model)
        if found := unfit(self.kind, model, paths, "carve"):
            return found
        hidden = {path: int(getattr(model.module(path), "hidden", 0)) for path in paths}
        least = min(hidden, key=lambda path: hidden[path])
        if sum(self.sizes(hidden[least])) == 0:
            title = f"`{self.kind}` would keep no channel of {least}"
            note = f"keep = {self.keep:g} of {hidden[least]} channels"
            help_ = f"keep at least {100 / hidden[least]:.2g}%, or a number"
            return [Diagnostic("E331", title, notes=(note,), help=help_, about="keep")]
        if isinstance(self.keep, int) and self.keep > hidden[least]:
            title = f"`keep` {self.keep} is above the {hidden[least]} channels of {least}"
            return [Diagnostic("E331", title, help=f"use at most {hidden[least]}, or a share", about="keep")]
        return []

    def outline(self, rw: Rewriter, others: Sequence[Model]) -> None:
        with rw.together():
            for path in feed_forwards(rw.model):
                dense = rw.module(path)
                replaced(rw, path, self._blank(dense), "carved")
            rw.insert("router", self._router(rw.model), after="embedding")

    def rewrite(self, rw: Rewriter, seen: Sequence[Mapping[str, Statistic]]) -> Mapping[str, float]:
        """Returns the share of each block's firing, over all domains, that its experts leave out."""
        lost: dict[str, float] = {}
        with rw.together():
            for path in feed_forwards(rw.model):
                dense = rw.module(path)
                scores = torch.stack([_mean(domain[f"{path}.down"]) for domain in seen])
                common, own = slices(scores, *self.sizes(dense.hidden))
                new = replaced(
                    rw,
                    path,
                    sliced(dense, self._blank(dense), common, own),
                    f"{len(common)} common channels and {own.shape[1]} of each expert, of {dense.hidden}",
                )
                lost[new] = _left_out(scores, common, own)
            router = self._router(rw.model)
            _draw(router)
            rw.insert("router", router, after="embedding")
        return lost

    def _blank(self, dense: MLP) -> Carved:
        common, own = self.sizes(dense.hidden)
        return Carved(
            width=dense.width,
            shared=common,
            experts=len(self.data),
            own=own,
            activation=dense.activation,
            gated=dense.gated,
            dtype=dense.dtype,
        )

    def _router(self, model: Model) -> PreGate:
        table = model.module("embedding")
        return PreGate(
            width=int(getattr(table, "width", 0)),
            inner=self.router_width,
            heads=self.router_heads,
            experts=len(self.data),
            dtype=str(getattr(table, "dtype", "float32")),
        )

    def work(self, model: Model, seq: int = 0) -> Work:
        tokens = self.samples * len(self.data) * seq
        nbytes = sum(t.numel() * t.element_size() for t in model.tensors().values())
        return Work(flops=float(tokens * count(model, seq // 2).flops_per_token), memory=2 * nbytes)


def _mean(found: Statistic) -> Tensor:
    assert isinstance(found, Fires)
    return found.mean()


def _left_out(scores: Tensor, common: Tensor, own: Tensor) -> float:
    kept = scores[:, common].sum(1) + torch.stack([s[o].sum() for s, o in zip(scores, own, strict=True)])
    return float(1 - (kept / scores.sum(1)).mean())


def _draw(router: PreGate) -> None:
    """Weights of standard deviation 1 / sqrt(inputs), norms of one; by seed and name."""
    for name, tensor in list(router.named_parameters()):
        path, _, slot = name.rpartition(".")
        if tensor.dim() == 1:
            value = torch.ones(tensor.shape)
        else:
            value = torch.randn(tensor.shape, generator=seeded(f"router.{name}")) / tensor.shape[1] ** 0.5
        setattr(router.get_submodule(path), slot, parameter(value.to(tensor.dtype)))
