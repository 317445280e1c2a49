"""Targets: shipped files are machines, bad files say what is wrong, rates rise with width."""

from __future__ import annotations

from pathlib import Path

import pytest

from effc.specs.diagnostic import EffcError
from effc.specs.target import TARGETS, named_target, read_target


@pytest.mark.parametrize("path", sorted(TARGETS.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_targets_are_machines(path: Path) -> None:
    target = read_target(path)
    assert target.name == path.stem
    assert not target.calibrated
    assert named_target(path.stem) == target


@pytest.mark.parametrize("training", [False, True])
def test_wider_models_come_closer_to_the_rate_of_large_products(training: bool) -> None:
    target = named_target("h200")
    rates = [target.rate("bfloat16", width, training) for width in (64, 256, 1024, 8192)]
    assert rates == sorted(rates)
    assert rates[0] == rates[1] == pytest.approx((target.train if training else target.forward)["bfloat16"])
    assert target.gemm["bfloat16"] / 2 < target.rate("bfloat16", 10**6) < target.gemm["bfloat16"]


def test_an_unmeasured_dtype_is_taken_as_float32() -> None:
    target = named_target("cpu-2core")
    assert target.rate("float16", 512) == target.rate("float32", 512)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("- 1\n", "name: field required"),
        ("name: x\n", "memory_bytes: field required"),
        ("name: [\n", "parsing"),
        ((TARGETS / "h200.yaml").read_text() + "speed: 3\n", "speed: extra inputs are not permitted"),
        ((TARGETS / "h200.yaml").read_text().replace("solve: 2.0e+12", "solve: -1"), "solve: "),
        ((TARGETS / "h200.yaml").read_text().replace("  float32: 4.2e+13\n", ""), "no rate for float32"),
    ],
)
def test_what_is_no_machine_is_refused(text: str, found: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(EffcError) as caught:
        read_target(path)
    (problem,) = caught.value.diagnostics
    assert problem.code == "E350"
    assert found in problem.notes[0]
    assert "cpu-2core" in str(problem.help)
