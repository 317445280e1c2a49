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
    """Values between launches are bfloat16: as far off as torch is in it, which is 0.7 %."""
    for name in ("dense", "4 bits", "4 bits, zero codes, normed heads", "8 bits, positions"):
        assert len(found[name]) == 4
        assert max(found[name]) < 0.012, name
    assert found["one place off"] > 0.02


def test_what_no_launch_does_is_said_in_words(found: dict[str, Any]) -> None:
    windowed, capped, narrow = found["refusals"]
    assert "a window of 4 tokens" in windowed
    assert "scores are capped at 5.0" in capped
    assert "Input should be 64 or 128" in narrow
