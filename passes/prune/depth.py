"""Remove the blocks that change their input least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor

from effc.compiler.contract import HEALED, Contract, Fact
from effc.compiler.cost import count
from effc.compiler.effort import STREAMED
from effc.compiler.method import Work
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Observe
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper
from effc.specs.units import Count, Share


class Depth(Observe):
    """Remove whole layers, those with the least block influence BI_l = 1 - mean cos(x_l, x_{l+1}) first.

    x_l are the hidden states [D] that enter layer l, one for each token of the calibration sequences; the
    mean runs over tokens. All layers are scored in one pass of the unchanged model. Of equal layers the later
    goes.

    Use when: latency or memory must fall with depth and a training stage follows.
    Costs:    one forward pass; quality drops at once and comes back with a few hundred steps of distillation.
    """

    paper = Paper(
        "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
        arxiv="2403.03853",
        year=2024,
        section="3.2",
    )
    contract = Contract(
        HEALED,
        keeps=tuple(Fact(name) for name in ("packed", "sparse", "sparse_2_4", "sparse_4_8", "unit_gain")),
    )
    examples = ("prune.depth(keep = 75%, data = code)", "prune.depth(keep = 2, data = code, samples = 4)")

    keep: Share | Count = Field(
        default=0.75, gt=0, description="layers that stay: a share of them, or how many"
    )

    def kept(self, layers: int) -> int:
        """How many of `layers` stay; a share is rounded to the nearest count."""
        return self.keep if isinstance(self.keep, int) else int(self.keep * layers + 0.5)

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        layers = model.layers
        if layers < 2:
            return [
                Diagnostic(
                    "E330",
                    f"`{self.kind}` needs a model with layers to choose from",
                    notes=(f"this one has {layers}",),
                )
            ]
        if 1 <= self.kept(layers) < layers:
            return []
        return [
            Diagnostic(
                "E331",
                f"`keep` of `{self.kind}` leaves {self.kept(layers)} of {layers} layers",
                help=f"keep between 1 and {layers - 1} layers, e.g. keep = {max(1, layers * 3 // 4)}",
                about="keep",
            )
        ]

    def observe(self, layer: int, before: Tensor, after: Tensor) -> Tensor:
        """before, after [B, T, D] -> [sum of 1 - cos, tokens] float64"""
        cos = torch.cosine_similarity(before.double(), after.double(), dim=-1)
        return torch.stack([(1 - cos).sum(), torch.tensor(float(cos.numel()), dtype=torch.float64)])

    def rewrite(self, rw: Rewriter, seen: Mapping[int, Tensor]) -> Mapping[str, float]:
        influence = {layer: float(total / tokens) for layer, (total, tokens) in seen.items()}
        drop = len(influence) - self.kept(len(influence))
        least = sorted(influence, key=lambda layer: (influence[layer], -layer))
        rw.remove_layers(sorted(least[:drop]))
        return {f"layers.{layer}": value for layer, value in sorted(influence.items())}

    def outline(self, rw: Rewriter, others: Sequence[Model]) -> None:
        layers = rw.model.layers
        rw.remove_layers(list(range(self.kept(layers), layers)))

    def work(self, model: Model, seq: int = 0) -> Work:
        width = int(getattr(model.module("embedding"), "width", 0))
        tokens = self.samples * seq
        cosines = 400.0 * tokens * width * model.layers  # fifty passes over float64 numbers, of fresh memory
        flops = float(tokens * count(model, seq // 2).flops_per_token)
        return Work(flops, traffic=cosines, memory=32 * STREAMED * width)
