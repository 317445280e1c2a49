"""Fast weights: gradients in closed form, chunks counted from the start, whatever the calls."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effc.compiler.fast_weights import Read, Three, apply, begin, gradients, orthogonal, stream


def weights(seed: int = 0) -> Three:
    """Of 2 heads, 6 channels, 5 hidden."""
    dice = torch.Generator().manual_seed(seed)
    a, b, c = (torch.randn(2, *s, generator=dice, dtype=torch.float64) for s in ((5, 6), (5, 6), (6, 5)))
    return a, b, c


def read(length: int, seed: int = 1) -> Read:
    dice = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(3, 2, length, 6, generator=dice, dtype=torch.float64) for _ in "qkv")
    rates = torch.rand(3, 2, length, 3, generator=dice, dtype=torch.float64) * 0.1
    return Read(q, k, v, rates, torch.rand(3, 2, length, generator=dice, dtype=torch.float64))


def part(given: Read, start: int, end: int) -> Read:
    return Read(*(t[:, :, start:end] for t in given))


def test_gradients_are_those_of_autograd() -> None:
    given = read(7)
    own = [w.expand(3, *w.shape).clone().requires_grad_() for w in weights()]
    found = gradients((own[0], own[1], own[2]), given.k, given.v, given.rates)
    for which, gradient in enumerate(found):
        score = (given.v * apply((own[0], own[1], own[2]), given.k)).sum(-1) * given.rates[..., which]
        (want,) = torch.autograd.grad(score.sum(), own[which])
        torch.testing.assert_close(gradient, want)


@pytest.mark.parametrize("rule", ["sgd", "momentum", "muon"])
def test_where_calls_end_changes_nothing(rule: str) -> None:
    given = read(23)
    whole, after = stream(begin(weights(), 3, 5, rule), given, 0, rule)  # type: ignore[arg-type]
    fast, outputs = begin(weights(), 3, 5, rule), []  # type: ignore[arg-type]
    for start, end in ((0, 3), (3, 4), (4, 10), (10, 11), (11, 23)):
        y, fast = stream(fast, part(given, start, end), start, rule)  # type: ignore[arg-type]
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 2), whole)
    for mine, theirs in zip(fast.weights, after.weights, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_chunk_is_read_before_it_is_learned() -> None:
    given = read(10)
    own: Three = tuple(w.expand(3, *w.shape) for w in weights())  # type: ignore[assignment]
    y, _ = stream(begin(weights(), 3, 5, "sgd"), given, 0, "sgd")
    torch.testing.assert_close(y[:, :, :5], apply(own, given.q[:, :, :5]))
    first = part(given, 0, 5)
    moved = [w + g for w, g in zip(own, gradients(own, first.k, first.v, first.rates), strict=True)]
    normed: list[Tensor] = [
        w * old.norm(dim=-1, keepdim=True) / w.norm(dim=-1, keepdim=True)
        for w, old in zip(moved, own, strict=True)
    ]
    torch.testing.assert_close(y[:, :, 5:], apply((normed[0], normed[1], normed[2]), given.q[:, :, 5:]))


def test_momentum_adds_what_is_left_of_earlier_gradients() -> None:
    given = read(11)
    plain, _ = stream(begin(weights(), 3, 5, "sgd"), given, 0, "sgd")
    still, _ = stream(
        begin(weights(), 3, 5, "momentum"), given._replace(betas=torch.zeros(3, 2, 11)), 0, "momentum"
    )
    moving, _ = stream(begin(weights(), 3, 5, "momentum"), given, 0, "momentum")
    torch.testing.assert_close(still, plain)
    torch.testing.assert_close(moving[:, :, :10], plain[:, :, :10])
    assert not torch.allclose(moving[:, :, 10], plain[:, :, 10])


@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
def test_muon_presses_singular_values_to_about_one(shape: tuple[int, int]) -> None:
    g = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(g))
    assert float(values.min()) > 0.5
    assert float(values.max()) < 1.4
