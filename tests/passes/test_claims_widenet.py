"""One attention and one mixture for all layers: experts against one dense layer, own norms against shared."""

from __future__ import annotations

from functools import cache
from itertools import combinations

import pytest

from effc.compiler.auxiliary import usage
from effc.compiler.cost import count
from effc.compiler.method import Context
from effc.compiler.model import Model
from effc.passes.moe.widenet import WideNet
from effc.passes.tie.recursive import Recursive
from effc.runtime.evaluate import loss
from effc.runtime.fit import fit
from effc.runtime.rewriting import rewrite
from tests.claims import Measured

from .lab import fresh
from .test_claims_experts import domains, full

pytestmark = pytest.mark.claim
SEEDS = (0, 1, 2)
LAYERS, STEPS = 6, 400
FORMS = {
    "experts": WideNet(experts=4, init="first"),
    "dense": Recursive(loops=LAYERS, init="lower"),
    "norms": WideNet(experts=4, init="first", norms="shared"),
}


@cache
def shared(seed: int, form: str) -> Model:
    """Six layers that share, trained from nothing on three domains; all begin with weights of one size."""
    thin = rewrite(FORMS[form], fresh(seed, layers=LAYERS), Context(seed)).model
    return fit(full(2e-3, STEPS), thin, Context(seed, {"data": domains(seed)})).model


def ended(seed: int, form: str) -> float:
    return loss(shared(seed, form), domains(seed))


@pytest.mark.parametrize("seed", SEEDS)
def test_experts_beat_one_dense_layer(seed: int, measured: Measured) -> None:
    work = [count(shared(seed, form), 16).flops_per_token for form in ("experts", "dense")]
    about = "moe.widenet"
    claim = "four experts, two for a token: work over that of one dense layer"
    measured(about, claim, work[0] / work[1], above=1.0)
    claim = f"6 shared layers, {STEPS} steps: loss of four experts, less that of one dense layer"
    measured(about, claim, ended(seed, "experts") - ended(seed, "dense"), below=0.0)


@pytest.mark.parametrize("seed", SEEDS)
def test_depths_choose_differently(seed: int, measured: Measured) -> None:
    batch = domains(seed).batch("heldout", range(300))
    shares = list(usage(shared(seed, "experts"), batch).values())
    assert len(shares) == LAYERS
    gaps = [float((a - b).abs().sum() / 2) for a, b in combinations(shares, 2)]
    claim = "share of choices that go elsewhere, between two depths: the mean over all pairs"
    measured("moe.widenet", claim, sum(gaps) / len(gaps), above=0.02)


@pytest.mark.parametrize("seed", SEEDS)
def test_own_norms_beat_shared_norms(seed: int, measured: Measured) -> None:
    claim = f"6 shared layers, {STEPS} steps: loss with own norms, less that with shared ones"
    measured("moe.widenet", claim, ended(seed, "experts") - ended(seed, "norms"), below=0.0)
