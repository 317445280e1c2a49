"""Samples that look at each other in training, and stand by themselves at rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effc.compiler.cost import count
from effc.compiler.isolation import isolation
from effc.compiler.rewrite import Rewriter
from effc.compiler.trace import TracedModel, trace
from effc.passes.reparam.batchformer import Batchformer
from tests.claims import Measured

from .edited import edited, moved
from .tiny_models import on_meta

APPLY, REMOVE = Batchformer(heads=2, dropout=0.0), Batchformer(mode="remove")


def net(seed: int = 0) -> TracedModel:
    torch.manual_seed(seed)
    return trace(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5)), torch.randn(4, 6))


def problems(method: Batchformer, model: Any) -> str:
    return "\n".join(d.render() for d in method.refuses(model))


def test_nothing_changes_at_rest_and_removing_it_changes_nothing() -> None:
    model, x = net(), torch.randn(7, 6)
    assert problems(APPLY, model) == ""
    wide = edited(APPLY, model)
    assert moved(APPLY, model, x, torch.float64) == 0
    assert count(wide).params > count(model).params
    assert problems(REMOVE, wide) == ""
    assert moved(REMOVE, wide, x, torch.float64) == 0
    back = edited(REMOVE, wide)
    assert count(back) == count(model)
    assert set(back.roles) == set(model.roles)
    rw = Rewriter(on_meta(model))
    APPLY.outline(rw, ())
    assert count(rw.done()) == count(wide)


def test_training_gives_every_sample_twice_in_any_order() -> None:
    wide, x = edited(APPLY, net()), torch.randn(6, 6)
    wide.train()
    out = wide(x)
    assert out.shape == (12, 5)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    again = wide(x[order])
    assert torch.allclose(again[:6], out[:6][order], atol=1e-5)
    assert torch.allclose(again[6:], out[6:][order], atol=1e-5)
    with pytest.raises(ValueError, match="at least two samples"):
        wide(x[:1])


def test_samples_meet_in_training_alone() -> None:
    wide = edited(APPLY, net())
    x = torch.randn(4, 6, requires_grad=True)

    def reach() -> Tensor:
        """d (second answer of sample 0) / d x, by sample."""
        (grad,) = torch.autograd.grad(wide(x)[-4].sum() if wide.training else wide(x)[0].sum(), x)
        return grad.abs().sum(1)

    wide.train()
    assert bool((reach()[1:] > 0).all())
    wide.eval()
    assert not bool(reach()[1:].any())
    assert isinstance(wide, TracedModel)
    assert isolation(wide).isolated
    found = isolation(wide, training=True)
    assert not found.isolated
    assert {leak.node for leak in found.leaks} == {"2_mixer"}


def test_what_does_not_fit_is_refused() -> None:
    assert "3 heads do not divide the 16 features before `2`" in problems(Batchformer(heads=3), net())
    assert "`1` is no linear of the graph" in problems(Batchformer(at="1"), net())
    assert "finds no layer to remove" in problems(REMOVE, net())
    assert problems(Batchformer(at="0", heads=2), net()) == ""
    for wrong in ({"heads": 0}, {"dropout": 1.0}, {"mode": "both"}):
        with pytest.raises(ValueError, match="validation error"):
            Batchformer.model_validate(wrong)


def samples(seed: int, rows: int, tail: float) -> tuple[Tensor, Tensor]:
    """Points about five centers; the last two kinds make up `tail` of them."""
    dice = torch.Generator().manual_seed(seed)
    centers = torch.randn(5, 6, generator=torch.Generator().manual_seed(3)) * 1.2
    weights = torch.tensor([1 - tail, 1 - tail, 1 - tail, 1.5 * tail, 1.5 * tail])
    kinds = torch.multinomial(weights, rows, True, generator=dice)
    return centers[kinds] + torch.randn(rows, 6, generator=dice), kinds


@pytest.mark.claim
def test_rare_kinds_are_told_no_worse(measured: Measured) -> None:
    right: dict[str, float] = {"plain": 0.0, "mixed": 0.0}
    for seed in (0, 1, 2):
        for name in right:
            model = net(seed) if name == "plain" else edited(APPLY, net(seed))
            model.train()
            parameters = [p.requires_grad_() for p in model.parameters()]
            optimizer = torch.optim.AdamW(parameters, lr=3e-3)
            for step in range(300):
                x, kinds = samples(1000 * seed + step, 32, 0.05)
                labels = kinds if name == "plain" else torch.cat((kinds, kinds))
                optimizer.zero_grad()
                F.cross_entropy(model(x), labels).backward()
                optimizer.step()
            model.eval()
            with torch.no_grad():
                x, kinds = samples(777, 4000, 0.4)
                rare = kinds >= 3
                right[name] += float((model(x).argmax(1) == kinds)[rare].float().mean()) / 3
    measured(
        "reparam.batchformer",
        "rare kinds told right, less 2 points, over plain training",
        right["mixed"] + 0.02,
        above=right["plain"],
    )
