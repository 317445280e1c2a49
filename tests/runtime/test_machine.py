"""This machine as a target: an estimate without measuring, a measured one in the user's cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from effc.compiler.model import Model
from effc.runtime import machine, throughput
from effc.runtime.exports.artifact import Artifact
from effc.runtime.exports.hf import Hf
from effc.specs.diagnostic import Diagnostic, EffcError
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
    monkeypatch.setattr(machine, "_export_seconds", lambda: {"start": 1.5, "consumer": 7.0})
    measured = machine.calibrate()
    assert measured.calibrated
    assert (measured.start, measured.consumer) == (1.5, 7.0)
    assert machine.this_machine() == measured
    assert isinstance(machine.chosen_target(machine.calibrated_path("cpu")), Target)
    assert [p.name for p in tmp_path.iterdir()] == ["effc"]  # the block for the disk is gone


def test_an_export_that_cannot_be_verified_here_keeps_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Hf, model: Model) -> None:
        raise EffcError(Diagnostic("E550", "the export cannot be verified without `transformers`"))

    monkeypatch.setattr(Hf, "publish", refused)
    monkeypatch.setattr(Artifact, "publish", lambda self, model: None)
    assert machine._export_seconds().keys() == {"start"}


def test_free_space_is_asked_where_the_store_will_be(tmp_path: Path) -> None:
    assert machine.disk_free(tmp_path / "not" / "yet") == machine.disk_free(tmp_path)
