"""Losses over the vocabulary: chunks change neither value nor gradient."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from effc.compiler import losses
from effc.compiler.losses import IGNORED, cross_entropy, surprise, weighted
from effc.passes.distill._divergence import divergence

V = 50


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_CHUNK", {"cpu": 3 * V})


def logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 8, V, generator=torch.Generator().manual_seed(seed)) * 2


def labels() -> torch.Tensor:
    found = torch.arange(16).reshape(2, 8) % V
    found[0, 3] = found[1, 7] = IGNORED
    return found


def test_cross_entropy_is_torchs_with_its_gradient() -> None:
    ours, theirs = logits().requires_grad_(), logits().requires_grad_()
    value = cross_entropy(ours, labels())
    expected = functional.cross_entropy(theirs.flatten(0, 1), labels().flatten())
    (2 * value).backward()
    (2 * expected).backward()
    assert torch.allclose(value, expected, atol=1e-6)
    assert ours.grad is not None
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-7)


def test_a_batch_without_labels_has_loss_zero_and_gradient_zero() -> None:
    z = logits().requires_grad_()
    value = cross_entropy(z, torch.full((2, 8), IGNORED))
    value.backward()
    assert value == 0
    assert z.grad is not None
    assert not z.grad.any()


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd", "tvd"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_model_is_at_no_distance_from_itself(direction: str, temperature: float) -> None:
    distance = divergence(direction, temperature, 0.3)
    same = distance(logits()[0], logits()[0])
    assert torch.allclose(same, torch.zeros(8), atol=1e-5)
    assert bool((distance(logits(0)[0], logits(1)[0]) > 0.01).all())


def test_directions_are_what_they_say() -> None:
    z_s, z_t = logits(0)[0], logits(1)[0]
    p, q = z_t.softmax(-1), z_s.softmax(-1)
    assert torch.allclose(divergence("forward", 1, 0.5)(z_s, z_t), (p * (p / q).log()).sum(-1), atol=1e-5)
    assert torch.allclose(divergence("reverse", 1, 0.5)(z_s, z_t), (q * (q / p).log()).sum(-1), atol=1e-5)
    assert torch.allclose(divergence("tvd", 1, 0.5)(z_s, z_t), (p - q).abs().sum(-1) / 2, atol=1e-5)
    m = 0.3 * p + 0.7 * q
    jsd = 0.3 * (p * (p / m).log()).sum(-1) + 0.7 * (q * (q / m).log()).sum(-1)
    assert torch.allclose(divergence("jsd", 1, 0.3)(z_s, z_t), jsd, atol=1e-5)


def test_temperature_keeps_the_size_of_the_gradient() -> None:
    norms = []
    for temperature in (1.0, 8.0):
        z = logits(0)[0].requires_grad_()
        divergence("forward", temperature, 0.5)(z, logits(1)[0]).mean().backward()
        assert z.grad is not None
        norms.append(float(z.grad.norm()))
    assert 0.3 < norms[1] / norms[0] < 3


def test_weighted_terms_are_told_alone() -> None:
    distance = divergence("forward", 1, 0.5)
    terms = [(0.9, lambda z, y, t: distance(z, t)), (0.1, lambda z, y, t: surprise(z, y))]
    total, (kd, ce) = weighted(logits(0), labels() != IGNORED, terms, labels(), logits(1))
    assert float(total) == pytest.approx(0.9 * float(kd) + 0.1 * float(ce), rel=1e-5)
    assert float(ce) == pytest.approx(float(cross_entropy(logits(0), labels())), rel=1e-5)
