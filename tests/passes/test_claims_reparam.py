"""What other forms of weights are for: training thin ones, sharing one array, planes of signs."""

from __future__ import annotations

import pytest

from effc.compiler.model import Model
from effc.passes.adapt.full import Full
from effc.passes.reparam.sparse_low_rank import SparseLowRank
from effc.runtime.parts.train.optimizer.adamw import AdamW
from tests.claims import Measured

from .edited import edited
from .lab import DATA, fresh, heldout, tuned

pytestmark = pytest.mark.claim
SEEDS = (0, 1, 2)


def trained(model: Model, seed: int, steps: int, lr: float = 3e-3) -> float:
    """The held-out loss after a training from what the model is."""
    method = Full(data=DATA, steps=steps, batch=32, precision="fp32", optimizer=AdamW(lr=lr))
    return heldout(tuned(method, model, "A", seed), "A", seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_scattered_numbers_beat_a_thin_product_alone(seed: int, measured: Measured) -> None:
    model, losses = fresh(seed, layers=4), []
    for density in (0.03, 1 / 64**2):
        thin = edited(SparseLowRank(rank=16, alpha=16.0, density=density, seed=seed), model)
        losses.append(trained(thin, seed, 300))
    measured(
        "reparam.sparse_low_rank",
        "rank 16 and 3 % of places end below rank 16 alone, 4 layers, 300 steps (nats)",
        losses[0] - losses[1],
        below=0.0,
    )
