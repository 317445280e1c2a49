"""Put gated linear attention in place of softmax attention, with new weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from effc.compiler.blocks.attention import Attention
from effc.compiler.blocks.gated_linear_attention import GatedLinearAttention
from effc.compiler.contract import HEALED, Contract, Fact
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Rewrite
from effc.passes.linearize._blocks import Blocks, begun, depth_scale
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper
from effc.specs.units import Count


class GLA(Blocks, Rewrite):
    """Replace attention by y = W_o (norm(q_t S_t / sqrt(K)) * swish(W_g x)), of states that forget.

    S_t = diag(a_t) S_{t-1} + k_t^T v_t, a_t = sigmoid(W_up W_down x + c)^(1 / gate_div). K is width *
    expand_k / heads channels a head, V likewise with expand_v. All weights of the block are new, drawn from
    the stage's seed with deviation 1 / sqrt(inputs), those that write into the stream smaller by sqrt(2
    layers): nothing of the attention is taken over.

    Use when: a model is trained from the start, or long enough to learn attention anew; `linearize.liger`
              keeps the weights of one that has learned.
    Costs:    what the attention knew. A token costs the same however long the sequence, and the cache is one
              matrix a head. There is no C kernel yet, so torch runs the model.
    """

    paper = Paper(
        "Gated Linear Attention Transformers with Hardware-Efficient Training",
        arxiv="2312.06635",
        year=2024,
        section="4",
    )
    contract = Contract(HEALED, gives=(Fact("dense", "select"),))
    examples = (
        "linearize.gla(heads = 2)",
        'linearize.gla(heads = 4, expand_k = 1, out_gate = none, select = ["layers[::2].attention"])',
    )

    heads: Count = Field(default=4, gt=0, description="heads, each with a state of its own")
    expand_k: float = Field(
        default=0.5, gt=0, le=8, description="channels of all keys, in widths of the model"
    )
    expand_v: float = Field(
        default=1.0, gt=0, le=8, description="channels of all values, in widths of the model"
    )
    gate_rank: Count = Field(default=16, gt=0, description="inner width of the projection to the gates")
    gate_div: float = Field(
        default=16.0, gt=0, description="divisor of the log gates; the larger, the longer a block remembers"
    )
    gating: Literal["vector", "scalar"] = Field(
        default="vector", description="a gate for every channel of a key, or one a head"
    )
    out_gate: Literal["swish", "none"] = Field(default="swish", description="gate on what a head puts out")
    chunk: Count = Field(default=64, gt=0, description="tokens between which a state is kept in training")
    sub: Count = Field(default=16, gt=0, description="tokens of a part of a chunk with decays of their own")

    @model_validator(mode="after")
    def _chunks_divide(self) -> Self:
        if self.chunk % self.sub:
            raise ValueError(f"sub must divide chunk: {self.chunk} / {self.sub}")
        return self

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        paths = self.blocks(model)
        found = list(self.unfit(model, paths))
        return found or list(self._uneven(model, paths))

    def _uneven(self, model: Model, paths: Sequence[str]) -> Iterator[Diagnostic]:
        """Channels that the heads cannot share equally."""
        width = int(model.module(paths[0]).width)  # type: ignore[arg-type]
        for name in ("expand_k", "expand_v"):
            channels = width * getattr(self, name)
            if channels % self.heads:
                fits = [n for n in range(1, min(width, 64) + 1) if channels % n == 0]
                yield Diagnostic(
                    "E320",
                    f"{channels:g} channels of `{name}` do not divide over {self.heads} heads",
                    help=f"use heads in {{{', '.join(map(str, fits))}}}" if fits else f"change {name}",
                    about="heads",
                )

    def outline(self, rw: Rewriter, others: Sequence[Model]) -> None:
        for path in self.blocks(rw.model):
            rw.swap(path, self._block(rw.module(path)))

    def rewrite(self, rw: Rewriter) -> None:
        layers = rw.model.layers
        for path in self.blocks(rw.model):
            block = self._block(rw.module(path))
            begun(block, lambda child, slot, tensor: _drawn(tensor, child, depth_scale(child, layers)))
            rw.swap(path, block)

    def _block(self, old: Attention) -> GatedLinearAttention:
        """An empty block for an attention's place."""
        return GatedLinearAttention(
            width=old.width,
            heads=self.heads,
            key_dim=int(old.width * self.expand_k) // self.heads,
            value_dim=int(old.width * self.expand_v) // self.heads,
            gate_rank=self.gate_rank,
            gate_div=self.gate_div,
            gating=self.gating,
            out_gate=self.out_gate,
            chunk=self.chunk,
            sub=self.sub,
            dtype=old.dtype,
        )


def _drawn(tensor: torch.Tensor, name: str, deep: float) -> torch.Tensor:
    """First values of one tensor: gains one, biases zero, matrices normal."""
    if tensor.dim() == 1:
        return torch.full(tensor.shape, float(name == "norm"), dtype=tensor.dtype)
    drawn: torch.Tensor = torch.randn(tensor.shape) / (tensor.shape[1] ** 0.5 * deep)
    return drawn.to(tensor.dtype)
