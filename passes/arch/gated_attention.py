"""Give attention a gate on what its heads take in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from effc.compiler.blocks.attention import Attention
from effc.compiler.blocks.gated_attention import GatedAttention
from effc.compiler.blocks.linear import Linear
from effc.compiler.contract import EXACT, HEALED, Contract, Fact
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.selects import Selects
from effc.compiler.shapes import Rewrite
from effc.passes._dense import shared, some
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper

_KEPT = ("packed", "sparse", "sparse_2_4", "sparse_4_8", "tied", "low_rank", "adapter")


class GatedAttentionSwap(Selects, Rewrite):
    """Y' = Y * sigmoid(X W_g) between the heads and W_o, X the block's input; `after_o`: behind W_o.

    init = neutral: W_g = 0 makes every gate one half, and W_o (with its bias, behind W_o) is doubled, so the
    function stays as it was until training moves the gates. init = random: W_g normal of deviation 0.02.

    Use when: a model is trained on, from the start or for long: gates keep attention from piling up on the
              first token.
    Costs:    d H weights a layer (head) or d H h (element), and twice as many FLOPs a token; the key-value
              cache stays. There is no C kernel yet, so torch runs the model.
    """

    paper = Paper(
        "Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free",
        arxiv="2505.06708",
        year=2025,
        section="2",
    )
    contract = Contract(
        EXACT.when(HEALED, init="neutral"), keeps=tuple(Fact(name, "model") for name in (*_KEPT, "dense"))
    )
    examples = (
        "arch.gated_attention()",
        "arch.gated_attention(kind = element, init = random)",
        'arch.gated_attention(kind = element, position = after_o, select = ["layers[0..2].attention"])',
    )

    select: tuple[str, ...] = Field(
        default=("attention",), description="blocks to gate, by their weights; default: all attention"
    )
    kind_: Literal["head", "element"] = Field(
        default="head", alias="kind", description="a gate a head, or a gate a channel"
    )
    init: Literal["neutral", "random"] = Field(
        default="neutral", description="whether the function stays as it was, or gates are drawn"
    )
    position: Literal["after_sdpa", "after_o"] = Field(
        default="after_sdpa", description="what is gated: what heads take in, or what the block puts out"
    )

    @model_validator(mode="after")
    def _has_heads(self) -> Self:
        if self.kind_ == "head" and self.position == "after_o":
            raise ValueError("behind W_o there are no heads to gate; write kind = element")
        return self

    def blocks(self, model: Model) -> list[str]:
        """Paths of the selected blocks, in model order."""
        return list(dict.fromkeys(path.rpartition(".")[0] for path in self.targets(model)))

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        paths = self.blocks(model)
        wrong = [path for path in paths if type(model.module(path)) is not Attention]
        if wrong:
            return [
                Diagnostic(
                    "E320",
                    f"`{self.kind}` gates softmax attention, and `{wrong[0]}` is none",
                    notes=(f"{some(wrong)}: {type(model.module(wrong[0])).__name__}",),
                    help='select attention, e.g. select = ["layers[0..3].attention"]',
                    about="select",
                )
            ]
        return list(self._undoubled(model, paths)) if self.init == "neutral" else []

    def _undoubled(self, model: Model, paths: Sequence[str]) -> Iterator[Diagnostic]:
        """Output matrices that cannot be doubled."""
        packed = [f"{p}.o" for p in paths if not isinstance(model.module(f"{p}.o"), Linear)]
        if packed:
            yield Diagnostic(
                "E323",
                f"`{self.kind}` doubles what writes the output, and needs it dense",
                notes=(f"{some(packed)}: {type(model.module(packed[0])).__name__}",),
                help="gate before packing or factoring, fold adapters first, or write init = random",
                about="init",
            )
        ties = shared(model)
        if tied := [f"{p}.o" for p in paths if f"{p}.o" in ties]:
            yield Diagnostic(
                "E341",
                f"`{self.kind}` cannot double an output that layers share",
                notes=(f"{some(tied)} is shared",),
                help="gate before tie.recursive, or write init = random",
                about="init",
            )

    def outline(self, rw: Rewriter, others: Sequence[Model]) -> None:
        for path in self.blocks(rw.model):
            rw.swap(path, self._block(rw.module(path)), self._words())

    def rewrite(self, rw: Rewriter) -> None:
        for path in self.blocks(rw.model):
            block = self._block(rw.module(path))
            gates = torch.zeros(block.gate.weight.shape)
            if self.init == "random":
                gates = torch.randn(gates.shape) * 0.02
            block.gate.weight = nn.Parameter(gates.to(block.gate.weight.dtype), requires_grad=False)
            rw.swap(path, block, self._words())
            if self.init == "neutral":
                self._double(rw, f"{path}.o")

    def _double(self, rw: Rewriter, path: str) -> None:
        unit = rw.linear(path)
        rw.write(path, "weight", unit.weight.detach() * 2, "times 2")
        bias = cast("Tensor | None", unit.bias)
        if bias is not None and self.position == "after_o":
            rw.write(path, "bias", bias.detach() * 2, "times 2")

    def _block(self, old: Attention) -> GatedAttention:
        """The gated block with the attention's own children and an empty gate."""
        floating = (p.dtype for p in old.parameters() if p.is_floating_point())
        dtype = str(next(floating, old.dtype)).removeprefix("torch.")
        given: dict[str, Any] = {k: v for k, v in old.spec().items() if k != "type"} | {"dtype": dtype}
        new = GatedAttention(**given, kind=self.kind_, position=self.position)
        for name, child in old._modules.items():
            new._modules[name] = child
        return new

    def _words(self) -> str:
        return f"a gate for every {self.kind_}, {self.init}"
