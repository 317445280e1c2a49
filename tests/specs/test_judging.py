"""An `expect` that was judged prints its numbers as the recipe writes them."""

from __future__ import annotations

import pytest

from effc.specs.recipe import Expect, Metric, Side, judge


@pytest.mark.parametrize(
    ("metric", "left", "right", "words"),
    [
        ("bytes", 3_908_100.0, 6e6, "3.91 MB <= 6 MB"),
        ("params", 7_841_000.0, 8e6, "7.84M <= 8M"),
        ("loss", 2.34567, 2.5, "2.34567 <= 2.5"),
    ],
)
def test_numbers_carry_the_unit_of_the_metric(metric: str, left: float, right: float, words: str) -> None:
    expect = Expect("the line", Side(Metric("m", metric)), "<=", Side(right))
    assert words in judge(expect, lambda _: left).text
