"""Put linear attention that scans an image both ways in place of an image encoder's attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from effc.compiler.blocks import PatchEmbed
from effc.compiler.blocks.attention import Attention
from effc.compiler.blocks.vig_attention import VigAttention
from effc.compiler.contract import HEALED, Contract, Fact
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Rewrite
from effc.passes._dense import some
from effc.passes.linearize._blocks import Blocks, begun, depth_scale
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper
from effc.specs.units import Count

_RUN = (
    *("leaves_its_input_alone", "logs_what_it_did", "keeps_its_contract", "predicts_its_cost_exactly"),
    *("estimates_its_work_without_weights", "roles_stay_true", "saved_model_loads_equal"),
    "same_seed_gives_the_same_numbers",
)


class ViG(Blocks, Rewrite):
    """y = W_o (g * norm(o) + (1 - g) * norm(l)), l = silu(conv(x)), o the mean of a scan there and one back.

    Both scans read the same q, k, v of l with gates of their own, sigmoid(W_up W_down l + c)^(1 /
    gate_div), and are scaled by 1 / sqrt(K), K half of a head's channels. The class token passes the
    convolution by. All weights of the block are new, drawn from the stage's seed: nothing of the attention
    is taken over.

    Use when: images are large, so that attention between all patches costs most, and the encoder is trained
              anew.
    Costs:    what the attention knew; work grows with the number of patches and not with its square.
    """

    paper = Paper(
        "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention",
        arxiv="2405.18425",
        year=2024,
        section="3",
    )
    contract = Contract(HEALED, gives=(Fact("dense", "select"),))
    waives: ClassVar[Mapping[str, str]] = dict.fromkeys(
        _RUN, "the tiny model reads text; tests/passes/test_vig.py holds it to an encoder of images"
    )
    examples = ("linearize.vig()", "linearize.vig(gate_rank = 4, dwconv = 5, inject = false)")

    gate_rank: Count = Field(default=16, gt=0, description="inner width of the projection to the gates")
    gate_div: float = Field(
        default=16.0, gt=0, description="divisor of the log gates; the larger, the longer a scan remembers"
    )
    dwconv: Count = Field(default=3, gt=0, le=31, description="side of the convolution's kernel, odd")
    inject: bool = Field(default=True, description="whether what the convolution gives is mixed in again")

    @model_validator(mode="after")
    def _has_a_middle(self) -> Self:
        if self.dwconv % 2 == 0:
            raise ValueError(f"dwconv = {self.dwconv} has no middle; use an odd number")
        return self

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        embedding = model.module("embedding")
        if not isinstance(embedding, PatchEmbed):
            note = f"the embedding is {type(embedding).__name__}; the convolution needs a square of patches"
            help_ = "use an image encoder, or linearize.gla for text"
            return [Diagnostic("E320", f"`{self.kind}` needs a model of images", notes=(note,), help=help_)]
        blocks: dict[str, Any] = {path: model.module(path) for path in self.blocks(model)}
        wrong = [path for path, block in blocks.items() if type(block) is not Attention]
        if not wrong:
            return []
        return [
            Diagnostic(
                "E320",
                f"`{self.kind}` changes softmax attention, and `{wrong[0]}` is none",
                notes=(f"{some(wrong)}: {type(blocks[wrong[0]]).__name__}",),
                help='linearize once, and select attention, e.g. select = ["layers[0..3].attention"]',
                about="select",
            )
        ]

    def outline(self, rw: Rewriter, others: Sequence[Model]) -> None:
        for path in self.blocks(rw.model):
            rw.swap(path, self._block(rw.model, rw.module(path)))

    def rewrite(self, rw: Rewriter) -> None:
        layers = rw.model.layers
        for path in self.blocks(rw.model):
            block = self._block(rw.model, rw.module(path))
            begun(block, lambda child, slot, tensor: _drawn(tensor, child, depth_scale(child, layers)))
            rw.swap(path, block)

    def _block(self, model: Model, old: Attention) -> VigAttention:
        embedding: Any = model.module("embedding")
        return VigAttention(
            width=old.width,
            heads=old.heads,
            key_dim=max(1, old.width // old.heads // 2),
            side=embedding.image // embedding.patch_size,
            gate_rank=self.gate_rank,
            gate_div=self.gate_div,
            kernel=self.dwconv,
            inject=self.inject,
            dtype=old.dtype,
        )


def _drawn(tensor: Tensor, name: str, deep: float) -> Tensor:
    """First values of one tensor: gains one, biases zero, the rest normal."""
    if tensor.dim() == 1:
        return torch.full(tensor.shape, float("norm" in name), dtype=tensor.dtype)
    drawn: Tensor = torch.randn(tensor.shape) / (tensor[0].numel() ** 0.5 * deep)
    return drawn.to(tensor.dtype)
