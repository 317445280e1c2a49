"""Channels that fire: which should, which are predicted to, what is computed of them, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from effc.compiler.blocks.fire_mlp import FireMLP, should_fire
from effc.compiler.cost import count
from effc.compiler.exporter import inexpressible
from effc.compiler.isolation import isolation
from effc.compiler.method import Context
from effc.compiler.model import Model
from effc.compiler.op_graph import evaluate, expand
from effc.compiler.rewrite import Rewriter
from effc.compiler.spent import counting
from effc.passes.adaptive.ftwt import FTWT, estimate
from effc.passes.quantize.rtn import RTN
from effc.runtime.fit import fit
from effc.runtime.generate import generate
from effc.runtime.parts.train.optimizer.adamw import AdamW
from effc.runtime.stage import run_stage
from effc.specs.recipe import Ref
from tests.compiler.conftest import DECODERS, fill

from .skipped import Again, stepped
from .tiny_models import blank, filled, outputs

CODE = Ref("code")
IDS = torch.randint(0, 48, (3, 9), generator=torch.Generator().manual_seed(4))
FAMILIES = ["llama", "qwen3", "gemma2", "gpt2", "neox"]


def method(**more: Any) -> FTWT:
    return FTWT.model_validate({"data": CODE, "steps": 1, "batch": 2} | more)


def firing(model: Model, bias: float = 0.0, **more: Any) -> Model:
    """The model with untrained predictors; at a bias of 0 about half of the channels fire."""
    chosen = method(**more)
    rw = Rewriter(model, "adaptive.ftwt")
    chosen.outline(rw, [])
    chosen.begin(rw, 0)
    out = rw.done()
    for _, unit in out.units():
        if isinstance(unit, FireMLP):
            shift = torch.full((unit.hidden,), bias)
            unit.fire_out.bias = torch.nn.Parameter(shift, requires_grad=False)
    return out


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Model:
    return fill(DECODERS[request.param]())


@pytest.mark.parametrize("rank", [0, 5])
def test_where_all_channels_fire_it_is_the_model_itself(family: Model, rank: int) -> None:
    same = firing(family, bias=1e6, predictor_rank=rank)
    assert float((outputs(same, IDS) - outputs(family, IDS)).abs().max()) <= 1e-5
    assert generate(same, IDS, max_new_tokens=4).tolist() == generate(family, IDS, max_new_tokens=4).tolist()
    more = sum(u.hidden * (rank or u.width) + rank * u.width + u.hidden for u in _blocks(same))
    assert count(same).params - count(family).params == more


def _blocks(model: Model) -> list[FireMLP]:
    return [u for _, u in model.units() if isinstance(u, FireMLP)]


def test_one_token_reads_the_channels_that_fire_alone(family: Model) -> None:
    """And computes what several tokens, masked, compute."""
    model = firing(family)
    for unit in _blocks(model):
        x = torch.randn(1, 6, unit.width, generator=torch.Generator().manual_seed(1))
        many = unit(x)
        one = torch.cat([unit(x[:, t : t + 1]) for t in range(6)], 1)
        torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(evaluate(expand(unit), unit, x, None)[0], many, rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]
        dead = unit.predicted(x) <= 0
        assert bool(dead.any())
        assert not bool(dead.all())
        spoiled = unit.inner(x).masked_fill(dead, 0.0)
        torch.testing.assert_close(unit.down(spoiled), many, rtol=1e-5, atol=1e-5)


def test_operations_are_those_of_channels_that_fire(family: Model) -> None:
    model = firing(family)
    fired: list[int] = []
    for unit in _blocks(model):
        unit.fire_out.register_forward_hook(lambda _m, _a, z: fired.append(int((z > 0).sum())))
    with counting(model, 8) as found:
        outputs(model, IDS)
    whole = count(model, 8).flops_per_token
    channels = sum(u.hidden * u.channel_flops() for u in _blocks(model))
    assert found.flops == 27 * (whole - channels) + sum(fired) * _blocks(model)[0].channel_flops()
    assert found.flops_per_token < whole
    with counting(model, 8) as steps:
        stepped(model, IDS[:1], first=1)
    with counting(model, 8) as again:
        outputs(model, IDS[:1])
    assert steps.flops == again.flops


def test_it_generates_as_it_reads(family: Model) -> None:
    model = firing(family)
    for rows in (IDS, IDS[:1]):
        steps, _ = stepped(model, rows, first=3)
        torch.testing.assert_close(steps, outputs(model, rows), rtol=1e-4, atol=1e-4)


def test_a_token_has_its_own_channels() -> None:
    found = isolation(firing(filled(blank(layers=2))))
    assert found.isolated, found.leaks


def test_what_should_fire_is_the_mass_and_no_more() -> None:
    a = torch.tensor([[4.0, -3.0, 2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    assert should_fire(a, 0.5).tolist()[0] == [True, True, False, False, False]  # 0.4, then 0.7 > 0.5
    assert should_fire(a, 0.35).tolist()[0] == [True, False, False, False, False]
    assert should_fire(a, 1.0).tolist()[0] == [True, True, True, True, False]
    assert not bool(should_fire(a, 0.9)[1].any())
    assert int(should_fire(a, 0.5)[2].sum()) == 3


@pytest.mark.parametrize("mode", ["decoupled", "joint"])
def test_a_predictor_s_loss_stays_with_it_or_not(mode: str, tiny: Model) -> None:
    model = firing(tiny, mode=mode)
    unit = _blocks(model)[0].train()
    x = torch.randn(2, 3, 32, requires_grad=True)
    unit(x)
    ((z, due),) = unit.told
    torch.nn.functional.binary_cross_entropy_with_logits(
        z, due.float()
    ).backward() if mode == "joint" else None
    if mode == "joint":
        assert x.grad is not None
        assert bool(x.grad.any())
    else:
        assert not z.requires_grad


def test_training_teaches_which_channels_fire(tiny: Model) -> None:
    data = Again(tiny, count=8)
    outcome = fit(
        method(steps=40, batch=8, mass=0.6, optimizer=AdamW(lr=3e-3)), tiny, Context(data={"data": data})
    )
    right = outcome.measures["curve"]["losses"]["right"]
    assert right[-1] > right[0] + 0.05
    assert {"fires", "should_fire", "flops_spent"} <= outcome.measures.keys()
    assert 0 < outcome.measures["fires"] < 1
    assert estimate(tiny, 0.6, data.batch("train", range(4))) == pytest.approx(0.35, abs=0.2)


def test_packed_weights_are_masked_all_the_same(tiny: Model) -> None:
    model = firing(tiny)
    small = run_stage(RTN(bits=8), [model], Context()).model
    assert len(_blocks(small)) == 6
    torch.testing.assert_close(stepped(small, IDS[:1])[0], outputs(small, IDS[:1]), rtol=1e-3, atol=1e-3)
    assert inexpressible(model)


def test_what_cannot_be_is_refused(tiny: Model, mixture: Model) -> None:
    (problem,) = method().refuses(mixture)
    assert problem.code == "E320"
    (problem,) = method(predictor_rank=20).refuses(tiny)
    assert (problem.code, problem.about) == ("E340", "predictor_rank")
    assert "at most 19" in str(problem.help)
    assert method(predictor_rank=19).refuses(tiny) == []
    assert [p.code for p in method().refuses(firing(tiny))] == ["E320"]
    for wrong in ({"mass": 0.0}, {"mass": 1.1}, {"mode": "both"}, {"predictor_rank": -1}):
        with pytest.raises(ValueError, match="validation error"):
            method(**wrong)
