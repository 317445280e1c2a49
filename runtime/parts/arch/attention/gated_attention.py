"""Attention with a gate on what its heads take in."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from effc.compiler.rewrite import Rewriter
from effc.passes.arch.gated_attention import GatedAttentionSwap
from effc.runtime.models._blocks import BlockPart


class GatedAttention(BlockPart):
    """Y' = Y * sigmoid(X W_g) between the heads and W_o, X the block's input; `after_o`: behind W_o.

    Use when: a model is trained from the start: gates keep attention from piling up on the first token.
    """

    paper = GatedAttentionSwap.paper
    examples: ClassVar[tuple[str, ...]] = ("gated_attention()", "gated_attention(kind = element)")

    kind_: Literal["head", "element"] = Field(
        default="head", alias="kind", description="a gate a head, or a gate a channel"
    )
    position: Literal["after_sdpa", "after_o"] = Field(
        default="after_sdpa", description="what is gated: what heads take in, or what the block puts out"
    )

    @model_validator(mode="after")
    def _has_heads(self) -> Self:
        if self.kind_ == "head" and self.position == "after_o":
            raise ValueError("behind W_o there are no heads to gate; write kind = element")
        return self

    def put(self, rw: Rewriter) -> None:
        given = {"kind": self.kind_, "position": self.position, "init": "random"}
        GatedAttentionSwap.model_validate(given).outline(rw, ())
