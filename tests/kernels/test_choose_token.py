"""choose_token in C: exactly torch.argmax, however a row is divided."""

from __future__ import annotations

import itertools

import pytest
import torch

from effc.kernels.choose_token import choose_token, reference
from effc.kernels.cpu.isa import available


def test_is_argmax_however_a_row_is_divided() -> None:
    for w, v in ((1, 1), (1, 1000), (7, 37), (3, 16), (2, 129)):
        dice = torch.Generator().manual_seed(v)
        logits = torch.randn(w, v, generator=dice)
        due = logits.argmax(-1)
        assert torch.equal(reference(logits), due)
        for isa, parts, threads in itertools.product(available(), {1, min(2, v), min(5, v)}, (1, 2)):
            assert torch.equal(choose_token(isa, logits, parts, threads), due), (isa, parts)


def test_among_equals_the_lowest_index_and_what_is_no_number_first() -> None:
    inf, nan = float("inf"), float("nan")
    logits = torch.randint(0, 3, (40, 75), generator=torch.Generator().manual_seed(1)).float()
    logits[0] = -inf
    logits[1] = 0.0
    logits[2, 1] = -0.0
    logits[3, [74, 30]] = inf
    logits[4, [50, 20, 60]] = torch.tensor([nan, inf, nan])
    logits[5] = nan
    logits[6, 74] = nan
    logits[7] = -3.0
    logits[7, 70:] = -2.0
    due = reference(logits)
    assert due[:8].tolist() == [0, 0, int(due[2]), 30, 50, 0, 74, 70]
    for isa, parts, threads in itertools.product(available(), (1, 2, 75), (1, 2)):
        assert torch.equal(choose_token(isa, logits, parts, threads), due), (isa, parts)


def test_what_cannot_be_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="5 parts of a row of 4 logits"):
        choose_token(available()[0], torch.zeros(2, 4), 5, 1)
