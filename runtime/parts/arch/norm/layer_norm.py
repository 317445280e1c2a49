"""Norms that take the mean away before they divide."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from effc.compiler.blocks.norm import Norm
from effc.compiler.rewrite import Rewriter
from effc.runtime.models._blocks import BlockPart
from effc.specs.paper import Paper


class LayerNorm(BlockPart):
    """y = g (x - mean x) / sqrt(var x + eps) + b, in place of the RMS norms of the stream.

    Use when: a model shall be compared with, or become, one of a family with layer norms.
    """

    paper = Paper("Layer Normalization", arxiv="1607.06450", year=2016, section="3")
    examples: ClassVar[tuple[str, ...]] = ("layer_norm()", "layer_norm(bias = false)")

    eps: float = Field(default=1e-5, gt=0, le=1, description="added to the variance")
    bias: bool = Field(default=True, description="whether a shift follows the gain")

    def put(self, rw: Rewriter) -> None:
        with rw.together():
            for path in rw.paths("norm"):
                old = rw.module(path)
                if isinstance(old, Norm) and ".attention." not in path:  # those of q and k stay
                    new = Norm(width=old.width, eps=self.eps, form="layer", bias=self.bias, dtype=old.dtype)
                    rw.swap(path, new)
