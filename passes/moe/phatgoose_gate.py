"""Train the gate of an adapter: a vector that tells which tokens it is good for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from effc.compiler.auxiliary import answered, total
from effc.compiler.blocks.lora_linear import LoraLinear
from effc.compiler.blocks.routed_lora import GatedLora
from effc.compiler.contract import TRAIN, Contract, Fact
from effc.compiler.losses import cross_entropy
from effc.compiler.method import Batch, Work
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Train
from effc.compiler.trained import training_work
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper


class PhatgooseGate(Train):
    """Learn v in y = W x + sigmoid(v x) s B A x, with W, A and B frozen and v zero at the start.

    The owner of an adapter runs it once, on the adapter's own text; moe.phatgoose then routes between several
    such models without any data. (The paper's learning rate is not confirmed here; it is the optimizer's.)

    Use when: an adapter shall be joined with others that were trained elsewhere.
    Costs:    one number for each input of an adapted linear; as adapt.lora to train, for about 100 steps.
    """

    paper = Paper(
        "Learning to Route Among Specialized Experts for Zero-Shot Generalization",
        arxiv="2402.05859",
        year=2024,
        section="3",
    )
    contract = Contract(
        TRAIN,
        needs=(Fact("adapter"),),
        gives=(Fact("gated"),),
        breaks=(Fact("adapter"),),
        keeps=tuple(Fact(name) for name in ("packed", "sparse", "sparse_2_4", "sparse_4_8")),
    )
    examples: ClassVar[tuple[str, ...]] = ("moe.phatgoose_gate(data = code, steps = 2, batch = 2)",)

    steps: int = Field(default=100, ge=1, description="optimizer steps")

    def outline(self, rw: Rewriter, others: Sequence[Model]) -> None:
        for path in _adapters(rw.model):
            old: LoraLinear = rw.module(path)
            unit = GatedLora(
                in_features=old.in_features,
                out_features=old.out_features,
                rank=old.rank,
                scale=old.factor,
                bias=old.bias,
                dtype=old.dtype,
            )
            unit.base, unit.a, unit.b = old.base, old.a, old.b
            rw.swap(path, unit, "a gate beside its adapter")

    def begin(self, rw: Rewriter, seed: int) -> None:
        for path in _gated(rw.model):
            gate = rw.module(path).gate
            rw.write(path, "gate", torch.zeros(gate.shape, dtype=gate.dtype))

    def trains(self, model: Model) -> list[str]:
        return [f"{path}.gate" for path in _gated(model)]

    def refuses(self, model: Model, others: Sequence[Model]) -> Sequence[Diagnostic]:
        if not _adapters(model):
            help_ = 'put adapt.lora(...) before it, or read one: adapter("...", on = base)'
            return [Diagnostic("E464", f"`{self.kind}` finds no adapter in the model", help=help_)]
        return []

    def loss(self, student: Model, teachers: Mapping[str, Any], batch: Batch) -> Mapping[str, Tensor]:
        z, more = answered(student, batch)
        return total(cross_entropy(z, batch.labels), more)

    def work(self, model: Model, seq: int = 0) -> Work:
        return training_work(self, model, seq)


def _adapters(model: Model) -> list[str]:
    return [path for path, unit in model.units() if isinstance(unit, LoraLinear)]


def _gated(model: Model) -> list[str]:
    return [path for path, unit in model.units() if isinstance(unit, GatedLora)]
