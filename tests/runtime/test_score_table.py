"""Scores as text: half a matrix of pairs, a column of everything else."""

from __future__ import annotations

from effc.runtime.score_table import score_lines


def test_pairs_are_half_a_matrix() -> None:
    scores = {"layers.2 layers.3": 0.9, "layers.2 layers.10": 0.25, "layers.3 layers.10": 0.5}
    assert list(score_lines(scores)) == [
        "              3     10",
        "layers.2  0.900  0.250",
        "layers.3         0.500",
    ]


def test_pairs_that_were_not_compared_stay_empty() -> None:
    lines = list(score_lines({"layers.1 layers.2": 1.0, "layers.3 layers.4": 0.5}))
    assert lines[1].split() == ["layers.1", "1.000"]
    assert lines[2].split() == ["layers.2"]
    assert lines[3].split() == ["layers.3", "0.500"]


def test_others_are_a_column_with_the_smallest_first() -> None:
    assert list(score_lines({"layers.0": 0.5, "layers.1": -1.25})) == ["layers.1  -1.25", "layers.0    0.5"]
    many = list(score_lines({f"layers.{i}": float(i) for i in range(25)}))
    assert len(many) == 21
    assert many[-1] == "and 5 more (--json has all)"
