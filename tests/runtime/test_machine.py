"""This machine as a target: an estimate without measuring, a measured one in the user's cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from effc.runtime import machine, throughput
from effc.specs.target import Target


def test_the_estimate_needs_no_measurement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = machine.this_machine()
    assert found.name == "estimated-cpu"
    assert not found.calibrated
    assert 10**8 < found.memory_bytes < 10**14


def test_a_calibrated_machine_is_found_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "_GEMM", 64)
    monkeypatch.setattr(machine, "_SOLVED", 16)
    monkeypatch.setattr(throughput, "BATCH", 1)
    monkeypatch.setattr(throughput, "FORWARD", 1)
    monkeypatch.setattr(throughput, "LENGTH", 4)
    monkeypatch.setattr(machine, "_COPY_BYTES", 1 << 16)
    monkeypatch.setattr(machine, "_FILE_BYTES", 1 << 16)
    monkeypatch.setattr(machine, "_idle_bytes", lambda: 300_000_000)
    monkeypatch.setattr(machine, "_tokenize_rate", lambda: 2e6)
    monkeypatch.setattr(machine, "_start_seconds", lambda module: 1.0)
    measured = machine.calibrate()
    assert measured.calibrated
    assert machine.this_machine() == measured
    assert isinstance(machine.chosen_target(machine.calibrated_path("cpu")), Target)
    assert [p.name for p in tmp_path.iterdir()] == ["effc"]  # the block for the disk is gone


def test_free_space_is_asked_where_the_store_will_be(tmp_path: Path) -> None:
    assert machine.disk_free(tmp_path / "not" / "yet") == machine.disk_free(tmp_path)
