"""Write out weights that are computed from other numbers, as plain matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from effc.compiler.blocks.linear import Linear
from effc.compiler.contract import EXACT, Contract, Fact
from effc.compiler.formed import FORMED
from effc.compiler.method import Work
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.selects import Selects
from effc.compiler.shapes import Rewrite
from effc.passes.reparam._linears import with_bias
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import FOLKLORE


class Dense(Selects, Rewrite):
    """Replace W(theta) x by W x: thin products B A, s B A + S, planes of signs times scales, shared arrays.

    Use when: training is over and speed counts more than size, or a later stage needs plain weights.
    Costs:    o i numbers a weight again; numbers of half precision are rounded once.
    """

    paper = FOLKLORE
    contract = Contract(EXACT, needs=(Fact("formed", "select"),), gives=(Fact("dense", "select"),))
    streams = True
    examples = ("reparam.dense()", 'reparam.dense(select = ["layers[0..2]"])')

    def paths(self, model: Model) -> list[str]:
        """Those of the selected modules that are in another form."""
        return [path for path in self.targets(model) if isinstance(model.module(path), FORMED)]

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        if self.paths(model):
            return []
        note = "products, sums of planes and hashed weights are; packed integers and adapters are not"
        title = f"`{self.kind}` finds nothing that is computed from other numbers"
        return [Diagnostic("E320", title, notes=(note,), help="leave the stage out, or select such modules")]

    def rewrite(self, rw: Rewriter) -> None:
        with rw.together():
            for path in self.paths(rw.model):
                form: Any = rw.present(path)
                out = Linear(
                    in_features=form.in_features,
                    out_features=form.out_features,
                    bias=form.bias is not None,
                    dtype=form.dtype,
                )
                with_bias(out, rw.module(path))
                if not any(t.is_meta for t in (*form.parameters(), *form.buffers())):
                    weight = form.dense().to(getattr(torch, form.dtype))
                    out.weight = nn.Parameter(weight, requires_grad=False)
                rw.swap(path, out, f"{type(form).__name__} written out")

    def work(self, model: Model, seq: int = 0) -> Work:
        units: list[Any] = [model.module(path) for path in self.paths(model)]
        sizes = [unit.in_features * unit.out_features for unit in units]
        ranks = [float(getattr(unit, "rank", 1)) for unit in units]
        flops = sum(2.0 * rank * size for rank, size in zip(ranks, sizes, strict=True))
        return Work(exact=flops, disk=4 * sum(sizes), memory=16 * max(sizes, default=0))
