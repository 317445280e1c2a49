"""Run a model in several streams at once, each behind learned keys and values, and weigh what they say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import nn

from effc.compiler.blocks.attention import Attention
from effc.compiler.blocks.norm import Norm
from effc.compiler.blocks.streams import Aggregate, PrefixAttention, Streams
from effc.compiler.contract import EXACT, HEALED, Contract, Fact
from effc.compiler.method import Work
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Rewrite
from effc.passes._dense import some
from effc.passes.moe._ffn import seeded
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper
from effc.specs.units import Count, Share

_KEPT = ("packed", "sparse", "sparse_2_4", "sparse_4_8", "tied", "low_rank", "adapter", "dense", "unit_gain")


class ParScale(Rewrite):
    """y = sum_p w_p h_p: P streams h_p of one model, weighed by w = softmax(W_s silu(W_m [h_1 .. h_P])).

    Stream p has, in every layer, `prefix` keys and values of its own that all of its tokens see and that
    count as no position; w is mixed with 1/P by `smoothing`. Everything else is shared. Prefixes, W_m and
    W_s are drawn at random by the seed of the stage. Without prefixes the streams are equal, and the model is
    what it was. To train the new parts alone: adapt.full(train = ["prefix", "aggregate"]).

    Use when: memory for weights is short and time is not: weights are read once for all streams.
    Costs:    work and cache times P, and `prefix` more pairs of keys and values a layer and stream;
              2 L P Hk prefix h + P d^2 + P d weights. The function moves until it is trained.
    """

    paper = Paper("Parallel Scaling Law for Language Models", arxiv="2505.10475", year=2025, section="2")
    contract = Contract(EXACT.when(HEALED, prefix=0), keeps=tuple(Fact(name, "model") for name in _KEPT))
    examples = (
        "grow.parscale(streams = 2, prefix = 4)",
        "grow.parscale(streams = 4, prefix = 1, smoothing = 0.1)",
        "grow.parscale(streams = 3, prefix = 0)",
    )

    streams_: int = Field(
        default=4, ge=2, le=8, alias="streams", description="P: how often the model runs at once"
    )
    prefix: Count = Field(default=48, description="n: learned keys and values of each layer and stream")
    smoothing: Share = Field(default=0.01, description="eps: share of the weights that is dealt out evenly")
    prefix_std: float = Field(default=0.02, gt=0, description="standard deviation that prefixes begin with")

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        return list(self._unfit(model))

    def _unfit(self, model: Model) -> Iterator[Diagnostic]:
        called = dict(model.gm.named_children())
        if "head" not in called or not isinstance(called.get("norm"), Norm):
            note = "streams are weighed between the last norm and the head"
            yield Diagnostic(
                "E320", f"`{self.kind}` needs a decoder with a norm before its head", (), (note,)
            )
            return
        if "streams" in called:
            note = f"it runs in {getattr(called['streams'], 'streams', 2)} streams"
            help_ = "grow once, with the number of streams you want"
            yield Diagnostic("E325", "the model runs in streams already", notes=(note,), help=help_)
            return
        blocks = {p: u for p, u in model.units() if p.startswith("layers.") and p.count(".") == 2}
        odd = [
            path
            for path, unit in blocks.items()
            if (path.endswith(".attention") and type(unit) is not Attention)
            or (unit.takes_step and not isinstance(unit, Attention))
        ]
        if odd:
            note = f"{some(odd)}: {type(blocks[odd[0]]).__name__}"
            help_ = "put this stage before the one that changed them"
            yield Diagnostic(
                "E320", f"`{self.kind}` needs softmax attention in every layer", (), (note,), help_
            )
        elif not self.prefix:
            note = "each would compute the same, at P times the work, until something tells them apart"
            title = "streams without prefixes are equal"
            yield Diagnostic("W332", title, (), (note,), "use prefix = 48", severity="warning")

    def outline(self, rw: Rewriter, others: Sequence[Model]) -> None:
        self._grow(rw)

    def rewrite(self, rw: Rewriter) -> None:
        self._grow(rw)
        for path, unit in rw.model.units():
            if isinstance(unit, PrefixAttention) and self.prefix:
                for name in ("k", "v"):
                    self._draw(rw, f"{path}.prefix", name, self.prefix_std)
        width = rw.module("norm").width
        self._draw(rw, "aggregate.mix", "weight", (self.streams_ * width) ** -0.5)
        self._draw(rw, "aggregate.score", "weight", width**-0.5)

    def _draw(self, rw: Rewriter, path: str, name: str, deviation: float) -> None:
        blank = getattr(rw.module(path), name)
        drawn = torch.randn(blank.shape, generator=seeded(f"{path}.{name}")) * deviation
        rw.write(path, name, drawn.to(blank.dtype))

    def _grow(self, rw: Rewriter) -> None:
        norm: Any = rw.module("norm")
        rw.insert("streams", Streams(streams=self.streams_), after="embedding")
        with rw.together():
            for path, unit in list(rw.model.units()):
                if type(unit) is Attention:
                    rw.swap(path, self._block(unit), f"{self.streams_} streams, {self.prefix} pairs before")
        settings = {"streams": self.streams_, "smoothing": self.smoothing, "dtype": norm.dtype}
        rw.insert("aggregate", Aggregate(width=norm.width, **settings), after="norm")

    def _block(self, old: Attention) -> nn.Module:
        given = {name: value for name, value in old.spec().items() if name != "type"}
        new = PrefixAttention(**given, streams=self.streams_, prefix_length=self.prefix)
        for name, child in old._modules.items():
            new._modules[name] = child
        return new

    def work(self, model: Model, seq: int = 0) -> Work:
        return Work(memory=max((t.numel() * t.element_size() for t in model.tensors().values()), default=0))
