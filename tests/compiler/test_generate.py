"""Generation with a cache equals generation without one; sampling is seeded, isolated and bounded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from effc.compiler.model import Model
from effc.runtime.generate import Sampling, choose, generate, probabilities
from effc.specs.diagnostic import EffcError

Ids = Callable[..., torch.Tensor]


def uncached(model: Model, ids: torch.Tensor, mask: torch.Tensor | None, new: int) -> torch.Tensor:
    for _ in range(new):
        token = model(ids, mask)[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat((ids, token), 1)
        mask = None if mask is None else torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
    return ids


def test_greedy_equals_uncached_token_by_token(generator: Model, ids: Ids) -> None:
    x = ids(generator, 3, 6)
    assert torch.equal(generate(generator, x, max_new_tokens=12), uncached(generator, x, None, 12))


def test_padded_prompts_generate_as_alone(generator: Model, ids: Ids) -> None:
    x = ids(generator, 2, 6)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :3] = 0
    both = generate(generator, x, mask, max_new_tokens=8)
    assert torch.equal(both, uncached(generator, x, mask, 8))
    assert torch.equal(both[0, 3:], generate(generator, x[:1, 3:], max_new_tokens=8)[0])


def test_sampling_is_seeded_and_rows_do_not_meet(tiny: Model, ids: Ids) -> None:
    x = ids(tiny, 3, 5)
    settings = {"max_new_tokens": 10, "temperature": 1.3, "top_k": 20, "top_p": 0.9}
    one = tiny.generate(x, seed=7, **settings)
    assert torch.equal(one, tiny.generate(x, seed=7, **settings))
    assert not torch.equal(one, tiny.generate(x, seed=8, **settings))
    assert torch.equal(one[:1], tiny.generate(x[:1], seed=7, **settings))
    assert not torch.equal(one, tiny.generate(x, **(settings | {"temperature": 0.0})))


def test_cuts_keep_the_likeliest() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04]]).log()
    kept = probabilities(logits, Sampling(1.0, top_k=2))[0] > 0
    assert kept.tolist() == [True, True, False, False, False]
    kept = probabilities(logits, Sampling(1.0, top_p=0.75))[0] > 0
    assert kept.tolist() == [True, True, False, False, False]
    kept = probabilities(logits, Sampling(1.0, top_p=0.81))[0] > 0
    assert kept.tolist() == [True, True, True, False, False]


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.7, 0.2, 0.1]).log().repeat(4000, 1)
    streams = [torch.Generator().manual_seed(i) for i in range(4000)]
    share = torch.bincount(choose(logits, Sampling(1.0), streams), minlength=3) / 4000
    torch.testing.assert_close(share, torch.tensor([0.7, 0.2, 0.1]), atol=0.03, rtol=0)


def test_a_row_ends_at_its_own_end_token(tiny: Model, ids: Ids) -> None:
    x = ids(tiny, 2, 5)
    free = tiny.generate(x, max_new_tokens=9)
    stop = int(free[0, 7])
    out = tiny.generate(x, max_new_tokens=9, eos=[stop], pad=60)
    end = free[0, 5:].tolist().index(stop) + 6
    assert torch.equal(out[0, :end], free[0, :end])
    assert (out[0, end:] == 60).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1.0}, "`temperature` is -1.0"),
        ({"top_p": 0.0}, "above 0 and at most 1"),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, "padded on the right"),
    ],
)
def test_settings_out_of_range_are_refused(tiny: Model, settings: dict[str, object], words: str) -> None:
    with pytest.raises(EffcError, match=words):
        tiny.generate(torch.tensor([[1, 2, 3]]), **settings)


def test_learned_positions_bound_the_length(made: Callable[[str], Model]) -> None:
    with pytest.raises(EffcError, match="the model has 40 positions"):
        made("gpt2").generate(torch.tensor([[1, 2, 3]]), max_new_tokens=38)
