"""Go wider instead of deeper: all layers share one attention and one mixture, each keeps its own norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import torch
from annotated_types import Ge
from pydantic import Field, model_validator
from torch import Tensor, nn

from effc.compiler.blocks.mlp import MLP
from effc.compiler.blocks.moe import MoE
from effc.compiler.blocks.unit import Unit
from effc.compiler.contract import HEALED, Contract, Fact
from effc.compiler.method import Work
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Rewrite
from effc.passes.moe._ffn import feed_forwards, filled, replaced, seeded, unfit
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper


class WideNet(Rewrite):
    """Share one attention and one mixture of E experts between the layers of a group; norms stay apart.

    Inputs differ from layer to layer by their norms, so the one router sends a token to other experts at
    each depth. The shared attention starts as the mean of the group's, or as its first; the experts as the
    feed-forward blocks of E layers, evenly spaced in the group; the router at random. (The paper trains from
    nothing: starting from a model is effc's own. Its capacity factor 1.2 drops tokens, which is left to
    `capacity`, in training alone.)

    Use when: stored bytes matter most and a long training follows.
    Costs:    per group one attention, E feed-forward blocks and a router to store; a token runs through k
              feed-forward blocks in each layer; the key-value cache stays as it is.
    """

    paper = Paper("Go Wider Instead of Deeper", arxiv="2107.11817", year=2021, section="3")
    contract = Contract(
        HEALED,
        needs=(Fact("dense", "attention"), Fact("dense", "mlp")),
        gives=(Fact("mixture"), Fact("tied")),
        keeps=(Fact("unit_gain"),),
    )
    examples = (
        "moe.widenet(experts = 3)",
        "moe.widenet(experts = 2, top_k = 1, groups = 2, init = first, capacity = 1.2)",
    )

    experts: int = Field(default=4, ge=2, le=4096, description="E: experts of each shared mixture")
    top_k: int = Field(default=2, ge=1, description="k: experts that a token runs through")
    groups: int = Field(default=1, ge=1, description="runs of layers that share; 1: all layers share")
    init: Literal["average", "first"] = Field(
        default="average", description="what the shared attention starts as: the mean, or the first layer's"
    )
    norms: Literal["per_block", "shared"] = Field(
        default="per_block", description="whether layers keep their own norms"
    )
    capacity: Literal["dropless"] | Annotated[float, Ge(1)] = Field(
        default="dropless",
        description="tokens an expert takes at most in training, in parts of an even share; dropless: all",
    )
    router_std: float = Field(default=0.02, gt=0, description="standard deviation of the router's weights")
    balance: float = Field(default=0.01, ge=0, description="weight of the balance loss in later training")

    @model_validator(mode="after")
    def _fewer_than_all(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(f"top_k is {self.top_k}, and there are {self.experts} experts; lower top_k")
        return self

    def runs(self, layers: int) -> list[list[int]]:
        """The layers of each group."""
        size = layers // self.groups
        return [list(range(start, start + size)) for start in range(0, size * self.groups, size)]

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        paths = feed_forwards(model)
        if found := unfit(self.kind, model, paths, "share"):
            return found
        layers = model.layers
        if layers % self.groups:
            fits = [n for n in range(1, layers + 1) if layers % n == 0]
            title = f"{layers} layers do not divide into {self.groups} groups"
            help_ = f"use groups in {{{', '.join(map(str, fits))}}}"
            return [Diagnostic("E331", title, help=help_, about="groups")]
        if self.experts > layers // self.groups:
            title = f"a group of {layers // self.groups} layers has no {self.experts} feed-forward blocks"
            help_ = f"use at most {layers // self.groups} experts, or fewer groups"
            return [Diagnostic("E331", title, help=help_, about="experts")]
        first = [_form(model, 0, name) for name in ("attention", "mlp")]
        for layer in range(1, layers):
            if [_form(model, layer, name) for name in ("attention", "mlp")] != first:
                title, note = f"layers 0 and {layer} cannot share weights", "their blocks have other shapes"
                return [Diagnostic("E332", title, notes=(note,))]
        if self.norms == "shared" and layers > self.groups:
            title = "layers with equal norms give their router no reason to choose differently"
            return [
                Diagnostic(
                    "W332", title, (), (), "write norms = per_block: it costs 2 d a layer", "warning", "norms"
                )
            ]
        return []

    def rewrite(self, rw: Rewriter) -> None:
        for group in self.runs(rw.model.layers):
            self._share(rw, group)

    def _share(self, rw: Rewriter, group: Sequence[int]) -> None:
        places = [group[round(i * (len(group) - 1) / max(1, self.experts - 1))] for i in range(self.experts)]
        moe = self._mixture([rw.module(f"layers.{i}.mlp") for i in places], f"layers.{group[0]}.mlp")
        for name in ("q", "k", "v", "o"):
            units = [rw.module(f"layers.{layer}.attention.{name}") for layer in group]
            sources = units if self.init == "average" else units[:1]
            for slot in [slot for slot, value in units[0]._parameters.items() if value is not None]:
                mean = _mean([getattr(unit, slot).detach() for unit in sources])
                rw.write(f"layers.{group[0]}.attention.{name}", slot, mean, "shared by its group")
        with rw.together():
            for layer in group:
                twin = moe if layer == group[0] else _twin(moe)
                replaced(rw, f"layers.{layer}.mlp", twin, f"{self.experts} experts, shared by its group")
        for layer in group[1:]:
            for name in ("q", "k", "v", "o"):
                rw.tie(f"layers.{layer}.attention.{name}", to=f"layers.{group[0]}.attention.{name}")
            for name in ("norm1", "norm2") if self.norms == "shared" else ():
                rw.tie(f"layers.{layer}.{name}", to=f"layers.{group[0]}.{name}")

    def _mixture(self, blocks: Sequence[MLP], name: str) -> MoE:
        """A mixture whose experts are the blocks."""
        first = blocks[0]
        moe = MoE(
            width=first.width,
            hidden=first.hidden,
            experts=self.experts,
            active=self.top_k,
            activation=first.activation,
            gated=first.gated,
            balance=self.balance,
            capacity=0.0 if self.capacity == "dropless" else float(self.capacity),
            dtype=first.dtype,
        )
        return filled(moe, name, blocks, self.router_std, seeded(name))

    def work(self, model: Model, seq: int = 0) -> Work:
        nbytes = sum(t.numel() * t.element_size() for t in model.tensors().values())
        return Work(memory=2 * nbytes)


def _twin(moe: MoE) -> MoE:
    """Another block with the very same tensors."""
    twin = moe.blank()
    for name, tensor in moe.named_parameters():
        path, _, slot = name.rpartition(".")
        twin.get_submodule(path)._parameters[slot] = tensor
    return twin


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    """Taken in float32; on meta there is nothing to add up."""
    first = tensors[0]
    if len(tensors) == 1 or first.is_meta:
        return first.clone()
    return torch.stack([t.float() for t in tensors]).mean(0).to(first.dtype)


def _form(model: Model, layer: int, name: str) -> Any:
    unit: nn.Module = model.module(f"layers.{layer}.{name}")
    return unit.spec() if isinstance(unit, Unit) else type(unit)
