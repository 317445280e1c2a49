"""rope in Triton, forward and backward: values, faults that must not go unseen, compilation."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
from pydantic import ValidationError

from effc.kernels.gpu import check
from effc.kernels.rope.emit_triton import RopeGpuSpec, emit, refuses

from .compiled import compiled, differences
from .test_compile import beside

pytest.importorskip("triton", reason="Triton has builds for Linux only")

OP = "rope.gpu"
SPECS = (
    RopeGpuSpec(heads=6, kv_heads=2, head_dim=64, rotated=64),
    RopeGpuSpec(heads=4, kv_heads=4, head_dim=80, rotated=20, cache=True),
)
COMPILED = (RopeGpuSpec(heads=32, kv_heads=8, head_dim=128, rotated=128, cache=True),)


def job(spec: RopeGpuSpec, text: str | None = None) -> dict[str, Any]:
    return {"op": OP, "spec": spec.model_dump(mode="json"), "text": text}


def test_values_bounds_and_races() -> None:
    found = check.run("interpret", [job(spec) for spec in SPECS])
    assert {spec.describe(): words for spec, words in zip(SPECS, found, strict=True) if words} == {}


FAULTS = {
    "the other way round": ("a * c - b * s", "a * c + b * s", "forward"),
    "slopes turned as values are": ("a * c + b * s)", "a * c - b * s)", "backward"),
    "neighbors in place of halves": ("(i + 10)[None, :], mask", "(i + 1)[None, :], mask", "forward"),
    "values that turn": ("turns = (head < 8)", "turns = (head < 12)", ""),
    "keys that do not": ("turns = (head < 8)", "turns = (head < 4)", ""),
    "positions left out": ("tl.load(positions + t) * 10", "t * 10", ""),
    "a row of the cache by token": ("row = tl.load(slots + t)", "row = t", ""),
    "angles of wider heads": ("tl.load(positions + t) * 10", "tl.load(positions + t) * 16", ""),
    "a rest that is not kept": ("j = 20 +", "j = 21 +", ""),
    "keys among values": ("head - 8)[:, None]", "head - 4)[:, None]", ""),
    "a head too many": ("live = (head < 12)", "live = (head < 13)", ""),
}


def test_seeded_faults_are_found() -> None:
    text = emit(SPECS[1])
    assert [name for name, (old, _, _) in FAULTS.items() if old not in text] == []
    found = check.run("interpret", [job(SPECS[1], text.replace(old, new)) for old, new, _ in FAULTS.values()])
    missed = {
        name: words
        for (name, (_, _, by)), words in zip(FAULTS.items(), found, strict=True)
        if not words or by not in words
    }
    assert missed == {}


def test_compilation_gives_the_golden_numbers(request: pytest.FixtureRequest) -> None:
    version = importlib.metadata.version("triton")
    found = compiled(OP, COMPILED, version)
    assert {label: one["wrong"] for label, one in found.items() if one["wrong"]} == {}
    assert all(one["together"] * one["warps"] >= 16 for one in found.values()), "too few warps to hide loads"
    assert differences(OP, version, found, request.config.getoption("--update-golden")) == []


@pytest.mark.kernels
def test_compilation_keeps_the_limits_with_3_6() -> None:
    found = compiled(OP, COMPILED, "3.6.0", beside("3.6.0"), kept=True)
    assert {label: one["wrong"] for label, one in found.items() if one["wrong"]} == {}


def test_what_cannot_be_is_refused_in_words() -> None:
    with pytest.raises(ValidationError, match="96 of 64 dimensions turn"):
        RopeGpuSpec(heads=4, kv_heads=4, head_dim=64, rotated=96)
    assert "beyond 31 bits" in str(refuses(SPECS[0], 2**24))
    assert refuses(SPECS[0], 2**12) is None
