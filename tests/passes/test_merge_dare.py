"""Dropping at random: what is kept is scaled, drawn by seed and place alone, and elected as ties elects."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from effc.compiler.model import Model
from effc.compiler.shapes import Spot
from effc.kernels.merge.draws import drawn
from effc.passes.merge.dare_ties import DareTies
from effc.passes.merge.ties import Ties
from tests.claims import Measured

from .test_merge import BASE, codes, exact, made, run, same

Family = tuple[Model, Model, Model]


@pytest.fixture(scope="module")
def family() -> Family:
    base = made(0, width=64)
    return base, made(1, base, width=64), made(2, base, width=64)


def test_with_nothing_dropped_it_is_ties_with_nothing_trimmed(family: Family) -> None:
    base, a, b = family
    for sign in ("sum", "count"):
        kept = DareTies(base=BASE, density=1.0, weight=(1, 2), lambda_=0.7, sign=sign)
        ties = Ties(base=BASE, density=1.0, weight=(1, 2), lambda_=0.7, sign=sign)
        same(run(kept, a, b, base=base), run(ties, a, b, base=base), 0)


@pytest.mark.parametrize(("rescale", "factor"), [("exact", 4.0), ("none", 1.0)])
def test_what_is_kept_is_scaled_and_the_rest_is_the_base(family: Family, rescale: str, factor: float) -> None:
    base, a, _ = family
    got = run(DareTies(base=BASE, density=0.25, rescale=rescale), a, base=base)
    start, end = exact(base), exact(a)
    kept = size = 0
    for name, tensor in got.items():
        change = end[name] - start[name]
        moved = tensor != start[name]
        assert torch.allclose((tensor - start[name])[moved], factor * change[moved], atol=1e-5)
        kept, size = kept + int(moved.sum()), size + tensor.numel()
    assert abs(kept / size - 0.25) < 0.02


def test_models_are_dropped_from_independently(family: Family) -> None:
    base, a, _ = family
    once = run(DareTies(base=BASE, density=0.5), a, base=base)
    twice = run(DareTies(base=BASE, density=0.5), a, a, base=base)
    start = exact(base)
    moved = [sum(int((m[n] != t).sum()) for n, t in start.items()) for m in (once, twice)]
    size = sum(t.numel() for t in start.values())
    assert abs(moved[0] / size - 0.5) < 0.02
    assert abs(moved[1] / size - 0.75) < 0.02


def test_seeds_differ_and_repeat(family: Family) -> None:
    base, a, b = family
    first = run(DareTies(base=BASE, seed=1), a, b, base=base)
    same(run(DareTies(base=BASE, seed=1), a, b, base=base), first, 0)
    other = run(DareTies(base=BASE, seed=2), a, b, base=base)
    assert any(bool((other[name] != tensor).any()) for name, tensor in first.items())


def test_pieces_do_not_change_what_is_drawn(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    base, a, b = family
    whole = run(DareTies(base=BASE, density=0.3), a, b, base=base)
    monkeypatch.setattr("effc.runtime.pieces.PIECE", 37)
    same(run(DareTies(base=BASE, density=0.3), a, b, base=base), whole, 0)


def test_draws_are_keyed_by_seed_model_tensor_and_place() -> None:
    whole = drawn(0, 0, Spot("a", 0), 100)
    assert (drawn(0, 0, Spot("a", 33), 67) == whole[33:]).all()
    for other in (
        drawn(1, 0, Spot("a", 0), 100),
        drawn(0, 1, Spot("a", 0), 100),
        drawn(0, 0, Spot("b", 0), 100),
    ):
        assert (other != whole).mean() > 0.9


def test_draws_are_as_likely_as_stated() -> None:
    draws = drawn(0, 0, Spot("a", 0), 1 << 18)
    for share in (0.1, 0.5, 0.9):
        assert abs(float((draws < share * 65536).mean()) - share) < 0.005


def test_what_cannot_work_is_refused(family: Family) -> None:
    base, a, b = family
    for density in (0, 1.1):
        with pytest.raises(ValidationError):
            DareTies(base=BASE, density=density)
    with pytest.raises(ValidationError):
        DareTies(base=BASE, seed=-1)
    assert codes(DareTies(base=BASE, weight=(1, 0)), a, b, base=base) == ["E452"]
    assert codes(DareTies(base=BASE, weight=(1, 1, 1)), a, b, base=base) == ["E452"]


@pytest.mark.claim
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_what_is_dropped_is_made_up_for_on_average(seed: int, measured: Measured) -> None:
    base = made(seed, width=32)
    tuned = made(seed + 10, base, width=32)
    start, want = exact(base), exact(tuned)
    draws = 100
    mean = dict.fromkeys(want, torch.zeros(()))
    for draw in range(draws):
        got = run(DareTies(base=BASE, density=0.5, seed=draw + seed * draws), tuned, base=base)
        mean = {name: mean[name] + got[name] / draws for name in got}
    off = sum(float((mean[n] - want[n]).square().sum()) for n in want)
    size = sum(float((want[n] - start[n]).square().sum()) for n in want)
    claim = "the mean of 100 draws at density 50 % is the whole change, within 11 % of it (10 % is the noise)"
    measured("merge.dare_ties", claim, (off / size) ** 0.5, below=0.11)
