"""Remove the layers that learned gates close, and let neighbors among the others share their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from effc.compiler.auxiliary import answered, total
from effc.compiler.contract import HEALED, Contract, Fact
from effc.compiler.losses import cross_entropy
from effc.compiler.method import Batch, Work
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Train
from effc.compiler.trained import training_work
from effc.passes.tie._branches import branches, gate, gates, open_gates, ungate
from effc.passes.tie._groups import share, shared_already, unlike
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper
from effc.specs.units import Count, Share

_MOST = 8


class FoldGPT(Train):
    """Learn a gate g_l on every layer, x + g_l F_l(x), remove the layers whose gates are smallest, and let
    each run of `group` layers that stay use the weights of its first.

    Gates start at 1 and train alone, all at once, so that layers which make up for each other are seen as
    such. Their loss is that of the next token + polarize sum_l s(g_l) + pressure (mean_l s(g_l) - (1 -
    remove))^2, with s(g) = (1 + eps) g^2 / (g^2 + eps): 0 when closed, 1 when open; eps falls from 0.5 to
    0.01 by equal factors. Both last terms, and eps, are effc's reading: the paper's form is not confirmed.
    Layers that stay keep no gate. Norm gains stay each layer's own, unless `tie_norms`.

    Use when: depth must fall, and download size further than depth; heal with distill.hidden(map = tail).
    Costs:    passes forward and backward for `steps` batches, and state for one number a layer; FLOPs and
              cache fall with the layers that go, bytes also with those that share.
    """

    paper = Paper(
        "FoldGPT: Simple and Effective Large Language Model Compression Scheme",
        arxiv="2407.00928",
        year=2024,
        section="3",
    )
    contract = Contract(
        HEALED,
        needs=(Fact("dense", "model"),),
        gives=tuple(Fact("tied", "model").when(group=n) for n in range(2, _MOST + 1)),
        keeps=tuple(Fact(name) for name in ("sparse", "sparse_2_4", "sparse_4_8", "unit_gain")),
    )
    rate = 0.02
    examples: ClassVar[tuple[str, ...]] = (
        "tie.foldgpt(data = code, steps = 3, batch = 2, remove = 34%)",
        "tie.foldgpt(data = code, steps = 2, batch = 2, remove = 16%, group = 2, tie_norms = true)",
    )

    steps: int = Field(default=200, ge=1, description="optimizer steps of the gates")
    remove: Share = Field(default=0.2, lt=1, description="share of the layers that go")
    group: int = Field(default=1, ge=1, le=_MOST, description="neighbors that share weights; 1: none do")
    keep_first: Count = Field(default=1, description="first layers that never go")
    keep_last: Count = Field(default=2, description="last layers that never go")
    polarize: float = Field(default=1e-3, ge=0, description="weight of what drives gates apart")
    pressure: float = Field(default=1.0, ge=0, description="weight of how many are still open")
    tie_norms: bool = Field(default=False, description="share norm gains as well")

    def gone(self, layers: int) -> int:
        """How many of `layers` go; a share is rounded to the nearest count."""
        return int(self.remove * layers + 0.5)

    def groups(self, left: int) -> list[list[int]]:
        """The layers that share, of `left` ones; the last group may be smaller."""
        return [list(range(i, min(i + self.group, left))) for i in range(0, left, self.group)]

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        layers, gone = model.layers, self.gone(model.layers)
        most = min(layers - 2, layers - self.keep_first - self.keep_last)
        if layers < 2 or most < 0:
            note = f"this one has {layers}; {self.keep_first} first and {self.keep_last} last ones stay"
            return [Diagnostic("E330", f"`{self.kind}` needs more layers than those that stay", (), (note,))]
        if not gone and self.group == 1:
            note = f"remove = {self.remove:.0%} of {layers} layers is none, and group = 1 shares nothing"
            help_ = f"remove at least {0.5 / layers:.1%}, or group neighbors with group = 2"
            return [
                Diagnostic("E331", f"`{self.kind}` would change nothing", (), (note,), help_, about="remove")
            ]
        if gone > most:
            title = f"`remove` of `{self.kind}` takes {gone} of {layers} layers"
            fixed = self.keep_first + self.keep_last
            note = f"at most {most} may go: 2 must be left, and {fixed} are kept by keep_first and keep_last"
            help_ = f"remove at most {most / layers:.0%}"
            return [Diagnostic("E331", title, (), (note,), help_, about="remove")]
        if self.group > layers - gone:
            title = f"`group` of `{self.kind}` is {self.group}, and {layers - gone} layers are left"
            return [Diagnostic("E331", title, help=f"use at most {layers - gone}", about="group")]
        return [*self._ungated(model), *self._unshared(model, layers - gone)]

    def _ungated(self, model: Model) -> list[Diagnostic]:
        """Layers that a gate of 0 would not leave as they came."""
        odd = [layer for layer, ends in enumerate(branches(model)) if ends is None] if self.remove else []
        if not odd:
            return []
        title = f"`{self.kind}` gates layers that add to the stream, and layer {odd[0]} does not"
        note = "what leaves it is no sum of what came in and its branches"
        return [Diagnostic("E320", title, (), (note,), "use a network with norms before its branches")]

    def _unshared(self, model: Model, left: int) -> list[Diagnostic]:
        """What keeps neighbors from sharing; which layers are neighbors is known when the gates are."""
        if self.group == 1:
            return []
        help_ = "fold first, and with the groups you want"
        found = unlike(model, range(model.layers)) + shared_already(self.kind, model, help_)
        if left % self.group:
            title = f"{left} layers do not divide into groups of {self.group}"
            note = f"the last group has {left % self.group}"
            found.append(Diagnostic("W330", title, (), (note,), severity="warning", about="group"))
        return found

    def free(self, layers: int) -> range:
        """The layers that may go."""
        return range(self.keep_first, layers - self.keep_last)

    def outline(self, rw: Rewriter, others: Sequence[Model]) -> None:
        gone = self.gone(rw.model.layers)
        self._fold(rw, list(self.free(rw.model.layers))[-gone:] if gone else [])

    def prepare(self, rw: Rewriter, others: Sequence[Model]) -> None:
        found = branches(rw.model)
        for layer in self.free(rw.model.layers):
            if (ends := found[layer]) is not None:
                gate(rw, layer, ends, _dtype(rw.model))

    def begin(self, rw: Rewriter, seed: int) -> None:
        open_gates(rw)

    def trains(self, model: Model) -> list[str]:
        return [f"{path}.weight" for path in gates(model).values()]

    def loss(self, student: Model, teachers: Mapping[str, Any], batch: Batch) -> Mapping[str, Tensor]:
        """ce, the share of gates that are still open, and their weighted sum."""
        z, more = answered(student, batch)
        paths = gates(student).values()
        g = torch.stack([student.module(path).get_parameter("weight")[0] for path in paths]).float()
        eps = 0.5 * 0.02 ** (batch.at / max(1, batch.of - 1))
        still = (1 + eps) * g.square() / (g.square() + eps)
        fixed = student.layers - len(still)
        apart = (still.sum() + fixed) / student.layers - (1 - self.remove)
        ce = cross_entropy(z, batch.labels)
        main = ce + self.polarize * still.sum() + self.pressure * apart.square()
        return total(main, more) | {"ce": ce, "open": still.mean()}

    def finish(self, rw: Rewriter) -> Mapping[str, float]:
        found = {layer: abs(float(rw.module(path).weight[0])) for layer, path in gates(rw.model).items()}
        least = sorted(found, key=lambda layer: (found[layer], -layer))
        ungate(rw)
        self._fold(rw, least[: self.gone(rw.model.layers)])
        return {f"layers.{layer}": value for layer, value in sorted(found.items())}

    def _fold(self, rw: Rewriter, drop: Sequence[int]) -> None:
        if drop:
            rw.remove_layers(sorted(drop))
        for group in self.groups(rw.model.layers) if self.group > 1 else []:
            share(rw, group, self.tie_norms)

    def work(self, model: Model, seq: int = 0) -> Work:
        return training_work(self, model, seq)


def _dtype(model: Model) -> str:
    """The dtype of the stream."""
    return str(getattr(model.module("embedding"), "dtype", "float32"))
