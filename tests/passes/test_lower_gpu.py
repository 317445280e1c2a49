"""Lowering for a GPU: the launches of a model compute what the model computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton has builds for Linux only")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.passes.gpu_programs"],
        capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"}, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def test_prompts_and_tokens_behind_them_are_those_of_the_model(found: dict[str, Any]) -> None:
    """Values between launches are bfloat16: as far off as torch is in it, which is 0.7 %.

    Rows of bytes lose more, and would lose all of it were a scale another's.
    """
    for name, errors in found["off"].items():
        assert len(errors) == 4, name
        assert max(errors) < (0.016 if name == "recurrences" else 0.012), name
    assert 0.01 < max(found["bytes"]["int8"]) < 0.03
    assert 0.04 < max(found["bytes"]["float8"]) < 0.12


def test_what_is_kept_in_a_wrong_place_is_seen(found: dict[str, Any]) -> None:
    for name, error in found["astray"].items():
        assert error > 0.02, name


def test_what_no_launch_does_is_said_in_words(found: dict[str, Any]) -> None:
    odd, many, plain, narrow, slots, long = found["refusals"]
    assert "multiple of 16" in odd
    assert "17 query heads share a key head" in many
    assert "experts without a gate" in plain
    assert "widths 128 and 96 are not multiples of 64" in narrow
    assert "stands for values" in slots
    assert long == "no Triton kernel attends to 1024 sequences of 65536 tokens"


def test_a_table_of_launches_needs_no_weights_and_says_why_not_a_faster_one(found: dict[str, Any]) -> None:
    ops = {name: dict(rows) for name, rows in found["ops"].items()}
    assert "byte_linear" in ops["bytes"]
    assert ops["bytes"]["quant_linear"] == "rows stay bfloat16: codes of 8 bits have no zero codes"
    assert {"sparse_linear", "binary_planes", "multi_lora", "dense_linear"} <= set(ops["several"])
    assert ops["several"]["dense_linear"] == "the weights are not packed: torch multiplies"
    adapted = [op for op, _ in found["ops"]["adapted"]]
    assert adapted.count("quant_linear") == 5  # q, k and v; o; gate and up; down; head
    assert "dense_linear" not in ops["adapted"]
    assert ops["experts"]["grouped_linear"] == "the experts' weights are not packed"
