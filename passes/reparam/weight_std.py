"""Let convolutions run with standardized weights while they train, and fold that in afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field
from torch import nn

from effc.compiler.contract import EXACT, HEALED, Contract, Fact
from effc.compiler.method import Work
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.selects import Selects
from effc.compiler.shapes import Rewrite
from effc.passes._dense import shared, some
from effc.passes._waived import on_a_decoder
from effc.passes.reparam._standard import Form, StandardConv
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper
from effc.specs.select import resolve

Conv = nn.modules.conv._ConvNd


class WeightStd(Selects, Rewrite):
    """Run a convolution with W'_o = (W_o - mean W_o) / sqrt(var W_o + eps) for W_o, for each filter o.

    `apply` puts this in while the network trains; gradients flow through the statistics, and the function
    changes at once. `fold` writes W' in place of W afterwards, which is exact. `form = deviation` divides by
    std W_o + eps, as the paper's text has it, where its code has the root of variance plus eps.

    Use when: a convolutional network trains with one or two images at a time, with norms over groups.
    Costs:    a pass over the weights for each batch in training; nothing once folded. A filter of one weight
              has no deviation and is left as it is, with a warning.
    """

    paper = Paper(
        "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization",
        arxiv="1903.10520",
        year=2019,
        section="3.1",
    )
    contract = Contract(EXACT.when(HEALED, mode="fold"), keeps=(Fact("tied"), Fact("packed")))
    waives: ClassVar[Mapping[str, str]] = on_a_decoder(
        "decoders have no convolution; tests/passes/test_weight_std.py holds it to convnets"
    )
    examples = ("reparam.weight_std()", "reparam.weight_std(mode = fold)")

    select: tuple[str, ...] = Field(default=(), description="layers to touch; default: all convolutions")
    mode: Literal["apply", "fold"] = Field(
        default="apply", description="standardize on every call, or once and for all"
    )
    eps: float = Field(
        default=1e-5, gt=0, lt=1, description="added to the variance; folding uses each layer's own"
    )
    form: Form = Field(default="variance", description="divide by sqrt(variance + eps) or by deviation + eps")

    def targets(self, model: Model) -> dict[str, Self]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return dict.fromkeys((p for p in self._chosen(model) if not _single(model.module(p))), self)

    def _chosen(self, model: Model) -> list[str]:
        wanted = StandardConv if self.mode == "fold" else Conv
        inner = {f"{path}.conv" for path, m in model.gm.named_modules() if isinstance(m, StandardConv)}
        names = [n for n in model.names() if isinstance(model.module(n.path), wanted) and n.path not in inner]
        if not names:
            return []
        table = resolve(self.select or ("*",), self.except_, self.rules, names)
        return [path for path, given in table.items() if given is not None]

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        chosen = self._chosen(model)
        if not self.targets(model):
            what = "convolution" if self.mode == "apply" else "convolution with standardized weights"
            return [Diagnostic("E320", f"`{self.kind}` finds no {what}", help="leave the stage out")]
        return list(self._problems(model, chosen))

    def _problems(self, model: Model, chosen: Sequence[str]) -> Iterator[Diagnostic]:
        ties = shared(model)
        tied = [p for p in chosen if p in ties or f"{p}.conv" in ties]
        if tied:
            yield Diagnostic(
                "E341",
                f"`{self.kind}` cannot standardize a weight that is shared",
                notes=(f"{some(tied)} shares its weight, which would be standardized twice",),
                help="leave it out with `except`",
            )
        if alone := [p for p in chosen if _single(model.module(p))]:
            yield Diagnostic(
                "W320",
                f"`{self.kind}` leaves `{some(alone)}` as it is",
                notes=("its filters have one weight, so no deviation",),
                severity="warning",
            )

    def rewrite(self, rw: Rewriter) -> None:
        for path in self.targets(rw.model):
            module: Any = rw.module(path)
            role = rw.role(path)
            if self.mode == "apply":
                rw.swap(path, StandardConv(module, self.eps, self.form), "weights standardized on every call")
                rw.model.roles[path] = role
                continue
            weight = module.weight.detach()
            rw.swap(path, module.conv, "no longer standardized on every call")
            rw.model.roles[path] = role
            if not weight.is_meta:
                rw.write(path, "weight", weight, "standardized")

    def work(self, model: Model, seq: int = 0) -> Work:
        numbers = [sum(t.numel() for t in model.module(path).parameters()) for path in self.targets(model)]
        return Work(solve=4.0 * sum(numbers), memory=8 * max(numbers, default=0))


def _single(module: Any) -> bool:
    """Whether a filter has one weight alone."""
    weight = module.conv.weight if isinstance(module, StandardConv) else module.weight
    return bool(weight[0].numel() == 1)
