"""Put a sliding window and a network that learns from the sequence in place of softmax attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, Self

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor

from effc.compiler.blocks.attention import Attention
from effc.compiler.blocks.lact_attention import LactAttention
from effc.compiler.contract import HEALED, Contract, Fact
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Rewrite
from effc.passes.linearize._blocks import Blocks, begun
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper
from effc.specs.units import Count

_KEPT = ("packed", "sparse", "sparse_2_4", "sparse_4_8", "tied", "low_rank", "adapter", "dense")
_GAIN = 0.5
"""Deviation of fast weights, times the root of their inputs: what both factors of a low rank start with."""


class LaCT(Blocks, Rewrite):
    """y = W_o (window attention + s * norm(f_W(q))), where W learns from each chunk of tokens that is full.

    f_W(x) = W_out (silu(W_gate x) * W_in x) in each of `heads` heads, `inner` times as wide inside. A chunk
    is read by the weights that the chunks before it left, then they move along the gradient of sum eta_t
    <v_t, f_W(k_t)>: as it is (sgd), with momentum, or also with its singular values pressed to one (muon);
    rows keep their norms. q, k, v, o are taken over. s = silu(W_s x) starts at zero, so at first the block
    is its window: an option of effc, as are learned first weights [F, D] of rank `low_rank` plus I / 2.
    That muon has momentum as well is not confirmed by the paper's text.

    Use when: sequences are far longer than a window, and the model is trained on or from the start.
    Costs:    18 D F FLOPs a token and head; a state of weights in float32 for every sequence, and a chunk
              of tokens. Nothing is learned before the first chunk is full. There is no C kernel, so torch
              runs the model.
    """

    paper = Paper("Test-Time Training Done Right", arxiv="2505.23884", year=2025, section="3")
    contract = Contract(HEALED, keeps=tuple(Fact(name, "model") for name in _KEPT))
    examples = (
        "linearize.lact(heads = 2, chunk = 4, window = 8, low_rank = 2)",
        "linearize.lact(heads = 4, chunk = 4, window = 4, low_rank = 0, opt = sgd, inner = 2)",
    )
    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    heads: Count = Field(default=4, gt=0, description="heads of the network that learns")
    chunk: Count = Field(default=2048, gt=0, description="tokens behind which weights move")
    window: Count = Field(default=2048, gt=0, description="tokens that softmax attention still sees")
    opt: Literal["sgd", "momentum", "muon"] = Field(
        default="muon", description="how weights move behind a chunk"
    )
    inner: float = Field(default=1.0, gt=0, le=16, description="inner width, in widths of a head")
    low_rank: Count = Field(
        default=32, description="rank of the first weights beside I / 2; 0: whole matrices"
    )
    lr0: float = Field(default=1e-3, gt=0, lt=10, description="rate of a token at the start of training")
    order: Literal["apply_then_update"] = Field(
        default="apply_then_update",
        description="a chunk is read before it is learned, so no token sees what comes",
    )

    @model_validator(mode="after")
    def _covers(self) -> Self:
        if self.window < self.chunk:
            raise ValueError(
                f"a window of {self.window} does not cover a chunk of {self.chunk}: tokens fall between"
            )
        return self

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        paths = self.blocks(model)
        return list(self.unfit(model, paths)) or list(self._misfit(model, paths))

    def _misfit(self, model: Model, paths: Sequence[str]) -> Iterator[Diagnostic]:
        block: Any = model.module(paths[0])
        whole = block.heads * block.head_dim
        part = whole // self.heads
        if whole % self.heads:
            fits = [n for n in range(1, min(whole, 64) + 1) if whole % n == 0]
            help_ = f"use heads in {{{', '.join(map(str, fits))}}}"
            title = f"{whole} channels do not divide over {self.heads} heads"
            yield Diagnostic("E320", title, help=help_, about="heads")
        elif self.opt == "muon" and min(part, int(part * self.inner)) < 2:
            title = (
                f"muon has nothing to turn in matrices of one row: {whole} channels over {self.heads} heads"
            )
            yield Diagnostic("E320", title, help="use fewer heads, or opt = momentum", about="opt")
        elif self.low_rank > min(part, int(part * self.inner)):
            limit = min(part, int(part * self.inner))
            title = f"`low_rank` {self.low_rank} is above the shorter side of a head's matrices"
            yield Diagnostic("E340", title, help=f"use a rank of at most {limit}, or 0", about="low_rank")
        longest = model.config.get("max_position_embeddings")
        if isinstance(longest, int) and self.chunk >= longest:
            yield Diagnostic(
                "E320",
                f"a chunk of {self.chunk} tokens is never left behind, so nothing is learned from it",
                notes=(f"the model's context has {longest} positions",),
                help=f"use a chunk below {longest}, e.g. chunk = {max(1, longest // 4)}",
                about="chunk",
            )

    def outline(self, rw: Rewriter, others: Sequence[Model]) -> None:
        for path in self.blocks(rw.model):
            rw.swap(path, self._block(rw.module(path)))

    def rewrite(self, rw: Rewriter) -> None:
        for path in self.blocks(rw.model):
            old = rw.module(path)
            block = self._block(old)
            begun(block, partial(_first, block), kept=old._modules)
            rw.swap(path, block)

    def _block(self, old: Attention) -> LactAttention:
        """The block with the attention's own children; what is new is empty."""
        given = {name: getattr(old, name) for name in _TAKEN}
        window = self.window if old.window is None else min(self.window, old.window)
        new = LactAttention(
            **given,
            window=window,
            chunk=min(self.chunk, window),
            fast_heads=self.heads,
            inner=self.inner,
            low_rank=self.low_rank,
            rule=self.opt,
            lr0=self.lr0,
        )
        for name, child in old._modules.items():
            new._modules[name] = child
        return new


_TAKEN = (
    *("width", "heads", "kv_heads", "head_dim", "bias", "bias_o"),
    *("rope", "qk_norm", "cap", "scale", "dtype"),
)
"""Arguments of an attention block that the new block has as well."""


def _first(block: LactAttention, name: str, slot: str, tensor: Tensor) -> Tensor:
    """First values of a new tensor: rates begin at lr0, the share of what is learned at zero."""
    if name == "rate" and slot == "bias":
        return torch.full(tensor.shape, block.first_bias, dtype=tensor.dtype)
    if tensor.dim() == 1:
        return torch.full(tensor.shape, float(slot == "weight"), dtype=tensor.dtype)
    if name in ("gate", "rate", "momentum"):
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    gain = _GAIN if slot in ("left", "right") else 1.0
    drawn: Tensor = torch.randn(tensor.shape) * gain / tensor.shape[-1] ** 0.5
    return drawn.to(tensor.dtype)
