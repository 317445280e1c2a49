"""BlockPart: a part that puts other blocks into a fresh model."""

from __future__ import annotations

from effc.compiler.method import Part
from effc.compiler.rewrite import Rewriter


class BlockPart(Part):
    """Fills a slot of `new(...)`, e.g. `attention = gated_attention(kind = element)`."""

    def put(self, rw: Rewriter) -> None:
        """Change the blocks of a model without weights; first values are drawn afterwards."""
        raise NotImplementedError
