"""Start a mixture of experts from a dense model: every expert begins as the same feed-forward block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

import torch
from annotated_types import Ge
from pydantic import Field, model_validator
from torch import Tensor

from effc.compiler.blocks.mlp import MLP
from effc.compiler.blocks.moe import MoE
from effc.compiler.contract import EXACT, HEALED, Contract, Fact
from effc.compiler.method import Work
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Rewrite
from effc.passes.moe._ffn import feed_forwards, filled, parameter, replaced, seeded, unfit
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper


class Upcycle(Rewrite):
    """Replace each n-th feed-forward block by a router and E copies of it; a token runs through k of them.

    p = softmax(W_r x), W_r [E, d] ~ N(0, router_std^2);  y = sum over the k largest of w_e FFN_e(x)

    With `renorm` w_e = p_e / (sum of the k), so equal experts give back the dense block: the model is the
    same until it is trained. Experts part because each sees other tokens, and by `noise` from the start.
    Training stages add `balance` E sum_e f_e p_e for each mixture to their loss (f_e: share of choices), and
    in them an expert may be held to `capacity` k / E of the tokens; outside of training no token is dropped,
    so no sequence depends on another. Optimizer state does not travel between stages.

    Use when: a dense model is to hold more at nearly the same work a token, and further training is paid for.
    Costs:    (E - 1) feed-forward blocks and a router to store for each that is replaced; (k - 1) blocks and
              a router more work for each token.
    """

    paper = Paper(
        "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints",
        arxiv="2212.05055",
        year=2022,
        section="2",
    )
    contract = Contract(
        EXACT.when(HEALED, renorm=True, noise=0.0),
        needs=(Fact("dense", "mlp"),),
        gives=(Fact("mixture"),),
        keeps=tuple(Fact(name) for name in ("sparse", "sparse_2_4", "sparse_4_8", "unit_gain")),
    )
    examples = (
        "moe.upcycle(experts = 4)",
        "moe.upcycle(experts = 4, every = 1, top_k = 1, capacity = 1.25, balance = 0)",
        "moe.upcycle(experts = 3, every = 3, top_k = 2, noise = 0.1, renorm = false)",
    )
    streams = True

    experts: int = Field(default=8, ge=2, le=4096, description="E: copies of each block that is replaced")
    top_k: int = Field(default=2, ge=1, description="k: experts that a token runs through")
    every: int = Field(default=2, ge=1, description="replace the n-th, 2n-th, ... block; 1: all of them")
    renorm: bool = Field(default=True, description="divide the weights of the k experts by their sum")
    capacity: Literal["dropless"] | Annotated[float, Ge(1)] = Field(
        default="dropless",
        description="tokens an expert takes at most in training, in parts of an even share; dropless: all",
    )
    router_std: float = Field(default=0.02, gt=0, description="standard deviation of the router's weights")
    noise: float = Field(
        default=0.0, ge=0, description="noise on each expert, in parts of the deviation of its weights"
    )
    balance: float = Field(default=0.01, ge=0, description="weight of the balance loss in later training")

    @model_validator(mode="after")
    def _fewer_than_all(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(f"top_k is {self.top_k}, and there are {self.experts} experts; lower top_k")
        return self

    def chosen(self, model: Model) -> list[str]:
        """Paths of the blocks that are replaced."""
        return feed_forwards(model)[self.every - 1 :: self.every]

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        blocks = feed_forwards(model)
        if self.every > len(blocks) > 0:
            title = f"there is no block number {self.every}, since the model has {len(blocks)}"
            return [Diagnostic("E331", title, help=f"use every = 1 to {len(blocks)}", about="every")]
        return unfit(self.kind, model, self.chosen(model), "make a mixture of")

    def rewrite(self, rw: Rewriter) -> None:
        with rw.together():
            for path in self.chosen(rw.model):
                dense = rw.present(path)
                replaced(rw, path, self._mixture(path, dense), f"{self.experts} experts of {path}")

    def _mixture(self, path: str, dense: MLP) -> MoE:
        """The mixture whose experts are the dense block, with a router drawn by seed and path."""
        dice = seeded(path)
        moe = MoE(
            width=dense.width,
            hidden=dense.hidden,
            experts=self.experts,
            active=self.top_k,
            activation=dense.activation,
            gated=dense.gated,
            renormalize=self.renorm,
            balance=self.balance,
            capacity=0.0 if self.capacity == "dropless" else float(self.capacity),
            dtype=dense.dtype,
        )
        filled(moe, path, [dense] * self.experts, self.router_std, dice)
        for expert in moe.experts.children() if self.noise and not dense.up.weight.is_meta else ():
            expert.weight = parameter(self._parted(expert.weight, dice))  # type: ignore[arg-type]
        return moe

    def _parted(self, copies: Tensor, dice: torch.Generator) -> Tensor:
        """copies [E, o, i] with noise of their own; a weight that is zero stays zero."""
        drawn = torch.randn(copies.shape, generator=dice) * (self.noise * float(copies[0].float().std()))
        return torch.where(copies == 0, 0.0, copies.float() + drawn).to(copies.dtype)

    def work(self, model: Model, seq: int = 0) -> Work:
        sizes = [sum(t.numel() * t.element_size() for t in model.module(p).parameters())
                 for p in self.chosen(model)]  # fmt: skip
        largest = max(sizes, default=0)
        return Work(disk=sum(sizes) * (1 + self.experts), memory=largest * (2 * self.experts + 1))
