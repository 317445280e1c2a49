"""Stack a trained model on top of itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from effc.compiler.blocks.lora_linear import LoraLinear
from effc.compiler.blocks.quant_linear import Packed
from effc.compiler.contract import HEALED, Contract, Fact
from effc.compiler.formed import FORMED
from effc.compiler.method import Work
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Rewrite
from effc.passes._dense import some
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper


class Stack(Rewrite):
    """Make a model `factor` times as deep out of copies of its layers; embedding, norm and head stay single.

    New layer l is a copy of old layer l mod L (`order = stack`: 0, 1, 2, 0, 1, 2) or of floor(l / factor)
    (`order = interleave`: 0, 0, 1, 1, 2, 2). Copies are trained apart: nothing is tied.

    Use when: you want a deeper model for fewer training tokens than from scratch; factors 2 to 4 are near the
              best.
    Costs:    the loss rises at once and falls below the shallow model's with training; parameters grow with
              depth.
    """

    paper = Paper(
        "Stacking Your Transformers: A Closer Look at Model Growth for Efficient LLM Pre-Training",
        arxiv="2405.15319",
        year=2024,
        section="3",
    )
    contract = Contract(
        HEALED,
        needs=(Fact("dense", "model"),),
        keeps=tuple(Fact(name) for name in ("dense", "sparse", "sparse_2_4", "sparse_4_8")),
    )
    streams = True
    examples = ("grow.stack(factor = 2)", "grow.stack(factor = 3, order = interleave)")

    factor: int = Field(default=2, ge=2, le=8, description="how many times as deep the model becomes")
    order: Literal["stack", "interleave"] = Field(
        default="stack", description="the whole on top of itself, or layer by layer"
    )

    def layout(self, layers: int) -> list[int]:
        """The old layer that each new layer copies."""
        if self.order == "interleave":
            return [new // self.factor for new in range(layers * self.factor)]
        return [new % layers for new in range(layers * self.factor)]

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        found = []
        if not model.layers:
            found.append(Diagnostic("E330", f"`{self.kind}` needs a model with layers to stack"))
        odd = [p for p in model.roles if isinstance(model.module(p), Packed | FORMED | LoraLinear)]
        if odd:
            types = sorted({type(model.module(p)).__name__ for p in odd})
            found.append(
                Diagnostic(
                    "E323",
                    f"`{self.kind}` grows dense models only",
                    notes=(f"{some(odd)}: {', '.join(types)}",),
                    help="reorder the recipe: grow, then prune, then quantize; fold adapters first",
                )
            )
        tied = [alias for alias in model.ties() if alias.startswith("layers.")]
        if tied:
            found.append(
                Diagnostic(
                    "E332",
                    f"`{self.kind}` would copy layers that share weights",
                    notes=(f"{some(tied)} is tied",),
                    help="grow before the stage that ties",
                )
            )
        return found

    def rewrite(self, rw: Rewriter) -> None:
        rw.arrange_layers(self.layout(rw.model.layers))

    def work(self, model: Model, seq: int = 0) -> Work:
        nbytes = sum(t.nbytes for t in model.tensors().values())
        return Work(disk=nbytes * (1 + self.factor))
