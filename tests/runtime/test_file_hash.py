"""Hashes of files are those of their bytes, however they are read, and never of a file that changed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from blake3 import blake3

from effc.compiler.checkpoint import read_header
from effc.compiler.checkpoint_write import SafetensorsWriter
from effc.runtime import file_hash, hash_ahead
from effc.runtime.fingerprints import hashes_of
from effc.runtime.objects import identity_of
from effc.runtime.remembered import Remembered
from effc.specs.recipe import Binding, Call, Recipe

LOADED = Binding("a", "model", "model", Call("load", {"path": "model"}))
RECIPE = Recipe("t", "", 1, {}, (LOADED,), (), ())


@pytest.mark.parametrize("size", [0, 1, 4095, 8192, 20001])
def test_reading_ahead_changes_nothing(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = torch.randint(0, 256, (size,), dtype=torch.uint8).numpy().tobytes()
    (tmp_path / "file").write_bytes(content)
    monkeypatch.setattr(file_hash, "BLOCK", 4096)
    for small in (0, 1 << 20):
        monkeypatch.setattr(file_hash, "SMALL", small)
        assert file_hash.hash_of(tmp_path / "file") == blake3(content).hexdigest()


def test_a_file_and_its_tensors_are_hashed_each_as_a_file_of_its_own(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(37, 5), "b": torch.randn(3).bfloat16(), "c": torch.zeros(0)}
    path = tmp_path / "model.safetensors"
    with SafetensorsWriter(path, {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()}) as file:
        for name, tensor in tensors.items():
            file.put(name, tensor)
    whole, own = hashes_of(path, read_header(path))
    assert whole == blake3(path.read_bytes()).hexdigest()
    assert own == {name: identity_of(tensor) for name, tensor in tensors.items()}


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hash_ahead, "LARGE", 1)
    monkeypatch.setattr(hash_ahead, "BLOCK", 1000)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").write_bytes(bytes(range(256)) * 40)
    return tmp_path / "model/model.safetensors"


def test_what_is_hashed_ahead_is_the_answer(weights: Path) -> None:
    about = hash_ahead.question(weights)
    assert hash_ahead.answer(about) is None
    hash_ahead.begin([RECIPE], Path("store"))
    assert hash_ahead.answer(about) == blake3(weights.read_bytes()).hexdigest()


def test_a_file_that_changes_under_the_hash_has_no_answer(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, real = threading.Event(), hash_ahead._hash

    def hashed(path: Path) -> str:
        go.wait(10)
        return real(path)

    monkeypatch.setattr(hash_ahead, "_hash", hashed)
    before = hash_ahead.question(weights)
    hash_ahead.begin([RECIPE], Path("store"))
    weights.write_bytes(b"other")
    go.set()
    assert hash_ahead.answer(before) is None
    assert hash_ahead.answer(hash_ahead.question(weights)) is None


def test_what_the_store_remembers_is_not_hashed(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Path("store").absolute()
    Remembered(store / "measured", store / "aside").get(hash_ahead.question(weights), lambda: "known")
    monkeypatch.setattr(hash_ahead, "_hash", lambda path: pytest.fail("it is known"))
    hash_ahead.begin([RECIPE], Path("store"))
    assert hash_ahead.answer(hash_ahead.question(weights)) is None
    os.utime(weights, (5, 5))
    assert Remembered(store / "measured", store / "aside").known(hash_ahead.question(weights)) is None


def test_hashing_ahead_waits_for_no_torch() -> None:
    code = "import sys, effc.runtime.hash_ahead; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
