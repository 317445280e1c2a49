"""Rewrites that promise the same function, on random models of families that their own tests leave out.

Folds of norms, batch norms, branches and e-graphs are held to families beside what is special to each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effc.compiler.facts import facts_of
from effc.compiler.formed import FORMED
from effc.compiler.model import Model
from effc.compiler.trace import TracedModel, trace
from effc.passes.reparam.batchformer import Batchformer
from effc.passes.reparam.dense import Dense
from effc.passes.reparam.hashed import Hashed
from effc.passes.reparam.sparse_low_rank import SparseLowRank
from effc.passes.reparam.weight_std import WeightStd
from tests.compiler.conftest import FAMILIES, fill, inputs

from .edited import edited, moved

FORMS: dict[str, Any] = {
    "sparse low rank": SparseLowRank(rank=4, init="svd"),
    "hashed": Hashed(keep=0.3),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_weights_written_out_compute_what_they_were_computed_from(name: str, form: str) -> None:
    model = edited(FORMS[form], fill(FAMILIES[name]()))
    held = sum(isinstance(unit, FORMED) for _, unit in model.units())
    assert held >= 8, "every layer is in the form"
    assert moved(Dense(), model, inputs(model, 3), torch.float32) < 1e-5
    assert moved(Dense(), model, inputs(model, 3), torch.float64) < 1e-9
    assert facts_of(edited(Dense(), model))["formed"] is False


class Pooled(nn.Module):
    """Two convolutions, the mean over places, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=2)
        self.classifier = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(torch.relu(self.two(torch.relu(self.one(x)))).mean((2, 3)))
        return out


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 5))


def sequence() -> nn.Module:
    conv = nn.Conv1d(4, 8, 3, stride=2)
    return nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 5))


CLASSIFIERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "pooled": (Pooled, (4, 3, 9, 9)),
    "perceptron": (perceptron, (4, 6)),
    "sequence": (sequence, (4, 4, 11)),
}


def classifier(name: str) -> tuple[TracedModel, Tensor]:
    torch.manual_seed(1)
    make, shape = CLASSIFIERS[name]
    return trace(make().eval(), torch.randn(shape)), torch.randn(shape)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_samples_that_met_in_training_stand_by_themselves_at_rest(name: str) -> None:
    model, x = classifier(name)
    apply = Batchformer(heads=2)
    assert moved(apply, model, x, torch.float32) < 1e-5
    wide: Model = edited(apply, model)
    assert moved(Batchformer(mode="remove"), wide, x, torch.float32) < 1e-5


@pytest.mark.parametrize("name", ["pooled", "sequence"])
def test_standardized_weights_are_the_same_once_and_for_all(name: str) -> None:
    model, x = classifier(name)
    standard = edited(WeightStd(), model)
    assert moved(WeightStd(mode="fold"), standard, x, torch.float32) < 1e-5
