"""Route every token to the best of several adapters, by gates that their owners trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from effc.compiler.blocks.routed_lora import GatedLora, RoutedLora, standardized
from effc.compiler.contract import LOSSY, Contract, Fact
from effc.compiler.method import Work
from effc.compiler.model import Model
from effc.compiler.presence import known, loaded
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Join
from effc.passes._dense import some
from effc.passes.moe._ffn import parameter
from effc.specs.diagnostic import Diagnostic, EffcError
from effc.specs.paper import Paper


class Phatgoose(Join):
    """Put the adapters of several models side by side; each token takes the k whose gates fit it best.

    score_z = x' v'_z / sqrt(i), with x' and v' at mean 0 and deviation 1 over their i inputs;
    y = W x + sum over the k largest of w_z s_z B_z A_z x, w = softmax of the k scores.

    At each linear alone: layers need not agree. A model more changes no stored number of the others. Ranks
    may differ, the smaller are filled with zeros.

    Use when: adapters for several kinds of text lie there, each with a gate from moe.phatgoose_gate, and a
              token shall find its own.
    Costs:    Z (rank (in + out) + in) numbers beside each weight; k rank (in + out) + Z in products for each
              token. A change that tokens choose cannot be folded.
    """

    paper = Paper(
        "Learning to Route Among Specialized Experts for Zero-Shot Generalization",
        arxiv="2402.05859",
        year=2024,
        section="3",
    )
    contract = Contract(
        LOSSY,
        needs=(Fact("gated"),),
        gives=(Fact("routed"),),
        breaks=(Fact("gated"),),
        keeps=tuple(Fact(name) for name in ("packed", "sparse", "sparse_2_4", "sparse_4_8")),
    )
    examples = ("moe.phatgoose(k = 1)", "moe.phatgoose(k = 2)")

    k: int = Field(default=2, ge=1, description="adapters that a token takes")

    def refuses(self, model: Model, others: Sequence[Model]) -> Sequence[Diagnostic]:
        models = [model, *others]
        if self.k > len(models):
            title = f"`k` is {self.k}, and there are {len(models)} models"
            return [Diagnostic("E331", title, help=f"use k = {len(models)} or less", about="k")]
        units = [_gated(m) for m in models]
        for number, found in enumerate(units, start=1):
            if not found:
                title = f"`{self.kind}` finds no gate in its model number {number}"
                help_ = "train one: moe.phatgoose_gate(..., data = ..., steps = 100)"
                return [Diagnostic("E320", title, help=help_)]
        for number, (one, other) in enumerate(pairwise(units), start=1):
            if odd := sorted(one.keys() ^ other.keys()):
                notes = (f"{some(odd)} in one of models {number} and {number + 1} alone",)
                title = f"`{self.kind}` joins adapters of the same modules"
                return [Diagnostic("E451", title, notes=notes, help="train them with one `select`")]
        return []

    def join(self, rw: Rewriter, others: Sequence[Model]) -> Mapping[str, float]:
        """Raises EffcError E451 where the weights beneath differ, E420 for a gate that never was trained."""
        with rw.together():
            for path, first in _gated(rw.model).items():
                units = [_present(model, path) for model in (rw.model, *others)]
                rw.swap(path, self._routed(path, first, units), f"{len(units)} adapters, {self.k} a token")
        return {}

    def _routed(self, path: str, first: GatedLora, units: Sequence[GatedLora]) -> RoutedLora:
        rank = max(unit.rank for unit in units)
        made = RoutedLora(
            in_features=first.in_features,
            out_features=first.out_features,
            rank=rank,
            experts=len(units),
            active=self.k,
            bias=first.bias,
            dtype=first.dtype,
        )
        made.base = first.base
        if any(unit.a.is_meta for unit in units):
            return made
        for number, unit in enumerate(units, start=1):
            if not bool((unit.gate != unit.gate.mean()).any()):
                title = f"the gate of model number {number} at {path} was never trained"
                help_ = "train it: moe.phatgoose_gate(..., data = ..., steps = 100)"
                raise EffcError(Diagnostic("E421", title, help=help_))
            if not _alike(units[0], unit):
                title = f"models 1 and {number} differ beneath their adapters"
                note = f"at {path}: adapters can be joined over one model"
                raise EffcError(Diagnostic("E451", title, notes=(note,)))
        made.a = parameter(torch.stack([F.pad(u.a.detach(), (0, 0, 0, rank - u.rank)) for u in units]))
        scaled = [(u.b.detach().float() * u.scale).to(u.b.dtype) for u in units]
        made.b = parameter(
            torch.stack([F.pad(b, (0, rank - u.rank)) for b, u in zip(scaled, units, strict=True)])
        )
        gates = torch.cat([standardized(u.gate.detach().float()) for u in units])
        made.gates = parameter((gates / first.in_features**0.5).to(first.gate.dtype))
        return made

    def work(self, model: Model, seq: int = 0) -> Work:
        nbytes = sum(t.numel() * t.element_size() for t in model.tensors().values())
        return Work(memory=2 * nbytes)


def _gated(model: Model) -> dict[str, GatedLora]:
    return {path: unit for path, unit in model.units() if isinstance(unit, GatedLora)}


def _present(model: Model, path: str) -> GatedLora:
    """With its weights, where there are any to read; a plan has none."""
    unit = loaded(model, path) if known(model, path) else model.module(path)
    assert isinstance(unit, GatedLora)
    return unit


def _alike(one: GatedLora, other: GatedLora) -> bool:
    """Whether the weights beneath are the same numbers."""

    def stored(unit: GatedLora) -> list[Tensor]:
        return [*unit.base.parameters(), *unit.base.buffers()]

    mine, theirs = stored(one), stored(other)
    return len(mine) == len(theirs) and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)
    )
