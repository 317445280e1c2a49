"""Add the change of an adapter to the weights beneath it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from effc.compiler.adapters import adapted
from effc.compiler.blocks.linear import Linear
from effc.compiler.blocks.lora_linear import LoraLinear
from effc.compiler.contract import EXACT, Contract, Fact
from effc.compiler.method import Work
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Rewrite
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper


class Fold(Rewrite):
    """Replace W x + s B A x by (W + s B A) x, for every adapter in the model.

    Use when: training is over and the adapter need not stay apart.
    Costs:    nothing; the adapter's numbers and FLOPs are saved. Half-precision weights round the sum once.
    """

    paper = Paper(
        "LoRA: Low-Rank Adaptation of Large Language Models", arxiv="2106.09685", year=2021, section="4.1"
    )
    contract = Contract(EXACT, needs=(Fact("adapter"),), gives=(Fact("dense"),))
    streams = True
    examples: ClassVar[tuple[str, ...]] = ("adapt.fold()",)

    def rewrite(self, rw: Rewriter) -> None:
        for path in adapted(rw.model):
            unit: LoraLinear = rw.present(path)
            assert isinstance(unit.base, Linear)
            known = not (unit.a.is_meta or unit.base.weight.is_meta)
            total = _sum(unit.base.weight, unit.change()) if known else None
            rw.swap(path, rw.module(path).base, f"rank {unit.rank} folded in")
            if total is not None:
                rw.write(path, "weight", total)

    def work(self, model: Model, seq: int = 0) -> Work:
        weights = [model.module(path).get_parameter("base.weight") for path in adapted(model)]
        numbers = [w.numel() for w in weights]
        nbytes = sum(w.nbytes for w in weights)
        return Work(solve=4.0 * sum(numbers), disk=2 * nbytes, memory=12 * max(numbers, default=0))

    def refuses(self, model: Model, others: Sequence[Model]) -> Sequence[Diagnostic]:
        paths = adapted(model)
        if not paths:
            return [Diagnostic("E464", "there is no adapter to fold", help="leave adapt.fold out")]
        packed = [path for path in paths if not isinstance(model.module(path).base, Linear)]
        if not packed:
            return []
        return [
            Diagnostic(
                "E463",
                f"the adapter at `{packed[0]}` lies over packed weights",
                notes=(f"{len(packed)} of {len(paths)} adapters do; the sum has no exact packed form",),
                help="fold before quantizing, or keep the adapter and export it as peft",
            )
        ]


def _sum(weight: Tensor, change: Tensor) -> Tensor:
    return (weight.to(change.dtype) + change).to(weight.dtype)
