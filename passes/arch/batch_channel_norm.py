"""Put norms over batch estimates and groups of channels in place of batch norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from pydantic import Field
from torch import nn

from effc.compiler.contract import HEALED, Contract, Fact
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.selects import Selects
from effc.compiler.shapes import Rewrite
from effc.passes._dense import some
from effc.passes._waived import on_a_decoder
from effc.passes.arch._batch_channel import BatchChannelNorm
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper
from effc.specs.select import resolve

_BatchNorm = nn.modules.batchnorm._BatchNorm


class BatchChannelNormSwap(Selects, Rewrite):
    """Replace bn(x) by gn(g (x - m) / sqrt(v + eps) + b), m and v estimates that move by `rate` a batch.

    m <- m + rate (mean of the batch - m), v likewise, before they are used; a norm over `groups` of channels
    follows. No gradient flows through m and v, which the source leaves open. Statistics, gain and shift are
    those of the batch norm. At rest the first part is affine, and every sample stands by itself.

    Use when: a network is to train on, with one or two images at a time, where batch norms fail; best with
              reparam.weight_std.
    Costs:    two numbers more a channel and one more pass over activations. The function changes at once.
    """

    paper = Paper(
        "Rethinking Normalization and Elimination Singularity in Neural Networks",
        arxiv="1911.09738",
        year=2019,
        section="4",
    )
    contract = Contract(
        HEALED, keeps=tuple(map(Fact, ("tied", "packed", "sparse", "sparse_2_4", "sparse_4_8")))
    )
    waives: ClassVar[Mapping[str, str]] = on_a_decoder(
        "decoders have no batch norm; tests/passes/test_weight_std.py holds it to convnets"
    )
    examples = ("arch.batch_channel_norm(groups = 4)",)

    select: tuple[str, ...] = Field(default=(), description="batch norms to replace; default: all")
    groups: int = Field(default=32, ge=1, description="groups of channels that are normalized together")
    rate: float = Field(default=0.01, gt=0, le=1, description="how far estimates move towards each batch")

    def targets(self, model: Model) -> dict[str, Self]:  # pyright: ignore[reportIncompatibleMethodOverride]
        names = [n for n in model.names() if isinstance(model.module(n.path), _BatchNorm)]
        if not names:
            return {}
        table = resolve(self.select or ("norm",), self.except_, self.rules, names)
        return dict.fromkeys((path for path, given in table.items() if given is not None), self)

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        chosen = self.targets(model)
        if not chosen:
            return [Diagnostic("E320", f"`{self.kind}` finds no batch norm", help="leave the stage out")]
        norms: dict[str, Any] = {path: model.module(path) for path in chosen}
        found = []
        if bare := [path for path, norm in norms.items() if norm.running_mean is None]:
            found.append(
                Diagnostic(
                    "E320",
                    f"`{self.kind}` needs running statistics to start from",
                    notes=(f"{some(bare)} has none (track_running_stats = False)",),
                    help="leave it out with `except`",
                )
            )
        uneven = {path: n.num_features for path, n in norms.items() if n.num_features % self.groups}
        if uneven:
            path, channels = next(iter(uneven.items()))
            fits = [n for n in range(1, channels + 1) if all(c % n == 0 for c in uneven.values())]
            found.append(
                Diagnostic(
                    "E321",
                    f"{self.groups} groups do not divide the {channels} channels of `{path}`",
                    help=f"use groups in {{{', '.join(map(str, fits[-4:]))}}}",
                    about="groups",
                )
            )
        return found

    def rewrite(self, rw: Rewriter) -> None:
        for path in self.targets(rw.model):
            role = rw.role(path)
            made = BatchChannelNorm.of(rw.module(path), self.groups, self.rate)
            rw.swap(path, made, f"{self.groups} groups behind estimated statistics")
            rw.model.roles[path] = role
