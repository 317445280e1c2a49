"""Weights in large pages: the same numbers, where they may lie, and what is left alone."""

from __future__ import annotations

from itertools import pairwise

import torch

from effc.kernels.cpu import pages


def test_small_tensors_move_together_and_keep_their_numbers() -> None:
    dice = torch.Generator().manual_seed(0)
    given = {str(i): torch.randn(700 + i, 333, generator=dice) for i in range(4)}
    given["turned"] = torch.randn(500, 300, generator=dice).t()
    given["bytes"] = torch.arange(77, dtype=torch.uint8)
    given["none"] = torch.empty(0)
    found = pages.in_large_pages(given)
    assert list(found) == list(given)
    for name, tensor in found.items():
        assert tensor.dtype == given[name].dtype
        assert tensor.is_contiguous()
        assert torch.equal(tensor, given[name])
        assert tensor.numel() == 0 or tensor.data_ptr() % 64 == 0
    places = sorted((t.data_ptr(), t.numel() * t.element_size()) for t in found.values() if t.numel())
    assert all(start + size <= after for (start, size), (after, _) in pairwise(places))
    assert places[0][0] % pages.PAGE == 0
    found["0"].add_(1)
    assert not torch.equal(found["0"], given["0"])


def test_a_large_tensor_stays_where_it_is() -> None:
    large = torch.arange(pages.LARGE // 4, dtype=torch.int32)
    found = pages.in_large_pages({"large": large})["large"]
    assert found.data_ptr() == large.data_ptr()
    assert torch.equal(found, torch.arange(pages.LARGE // 4, dtype=torch.int32))


def test_less_than_a_page_is_not_worth_a_move() -> None:
    small = torch.ones(1000)
    assert pages.in_large_pages({"small": small})["small"].data_ptr() == small.data_ptr()
