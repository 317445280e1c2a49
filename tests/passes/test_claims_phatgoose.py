"""Routing between adapters that never met: better than their mean, and to the right one.

A model knows text of three domains; adapters learn, each in one domain, another language over its tokens.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from effc.compiler.blocks import RoutedLora
from effc.compiler.method import Context
from effc.compiler.model import Model
from effc.compiler.shapes import Train
from effc.passes.adapt.lora import Lora
from effc.passes.merge.linear import Linear
from effc.passes.moe.phatgoose import Phatgoose
from effc.passes.moe.phatgoose_gate import PhatgooseGate
from effc.runtime.evaluate import loss
from effc.runtime.fit import fit
from effc.runtime.merge import merge
from effc.runtime.parts.train.optimizer.adamw import AdamW
from effc.runtime.stage import run_stage
from tests.claims import Measured

from .lab import DATA
from .test_claims_experts import Domain, dense

pytestmark = pytest.mark.claim
SEEDS = (1, 2, 3)
FORMS: dict[str, Any] = {"data": DATA, "batch": 16, "precision": "fp32"}
OWN = (1, 2)
"""The domains that have adapters."""


@cache
def text(seed: int, number: int) -> Domain:
    """Another language over the tokens of a domain."""
    return Domain(number, seed + 50)


def tuned(method: Train, model: Model, seed: int, number: int) -> Model:
    return fit(method, model, Context(seed, {"data": text(seed, number)})).model


@cache
def adapter(seed: int, number: int) -> Model:
    method = Lora(rank=8, alpha=16, steps=100, optimizer=AdamW(lr=1e-2, wd=0), **FORMS)
    return tuned(method, dense(seed), seed, number)


@cache
def gated(seed: int, number: int) -> Model:
    method = PhatgooseGate(steps=100, optimizer=AdamW(lr=5e-3, wd=0), **FORMS)
    return tuned(method, adapter(seed, number), seed, number)


def routed(seed: int, k: int) -> Model:
    return run_stage(Phatgoose(k=k), [gated(seed, number) for number in OWN], Context(seed)).model


@pytest.mark.parametrize("seed", SEEDS)
def test_routing_beats_the_mean_of_adapters(seed: int, measured: Measured) -> None:
    mean = merge(Linear(), [adapter(seed, number) for number in OWN], Context(seed)).model.materialize()
    ends = [sum(loss(model, text(seed, n)) for n in OWN) / 2 for model in (routed(seed, 2), mean)]
    claim = "on text of both domains routing ends 0.02 nat below the mean of the adapters"
    measured("moe.phatgoose", claim, ends[1] - ends[0], above=0.02)


@pytest.mark.parametrize("seed", SEEDS)
def test_sequences_find_their_adapter(seed: int, measured: Measured) -> None:
    model = routed(seed, 1)
    right = []
    for place, number in enumerate(OWN):
        batch = text(seed, number).batch("heldout", range(100))
        votes = torch.zeros(100)

        def see(unit: Any, args: Any, votes: torch.Tensor = votes, place: int = place) -> None:
            _, chosen = unit.route(args[0].flatten(0, 1))
            votes += (chosen.view(100, -1) == place).float().mean(1)

        units = [unit for _, unit in model.units() if isinstance(unit, RoutedLora)]
        handles = [unit.register_forward_pre_hook(see) for unit in units]
        with torch.no_grad():
            model(batch.ids, step=batch.step)
        for handle in handles:
            handle.remove()
        right.append(float((votes / len(units) > 0.5).float().mean()))
    claim = "of sequences of one domain, 80 % have most of their tokens and modules at its adapter"
    measured("moe.phatgoose", claim, min(right), above=0.8)
