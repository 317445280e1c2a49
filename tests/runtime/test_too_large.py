"""Exports of a model that is too large here for its consumer: files are compared block by block, and the
verdict says what nobody verified.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.weights import resident
from effc.passes.adapt.lora import Lora
from effc.passes.quantize.rtn import RTN
from effc.runtime.exports import _export
from effc.runtime.exports._export import Export
from effc.runtime.exports.artifact import Artifact
from effc.runtime.exports.compressed_tensors import CompressedTensors
from effc.runtime.exports.hf import Hf
from effc.runtime.exports.peft import Peft
from effc.runtime.load import load
from effc.specs.diagnostic import EffcError
from effc.specs.recipe import Ref
from tests.runtime.counted import Counted
from tests.trust.hostile import sound

FORMATS: dict[str, type[Export]] = {
    "artifact": Artifact,
    "hf": Hf,
    "compressed_tensors": CompressedTensors,
    "peft": Peft,
}


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Model]:
    """A model for a format, its weights on disk; memory is too small for any consumer."""
    monkeypatch.setattr(_export, "memory_bytes", lambda: 1000)

    def model(kind: str) -> Model:
        rw = Rewriter(load(sound(tmp_path / "model")).materialize())
        if kind == "peft":
            method = Lora(data=Ref("code"), steps=1, rank=2)  # type: ignore[call-arg]
            method.outline(rw, [])
            method.begin(rw, 0)
        elif kind != "hf":
            RTN(bits=4, group=8, select=("mlp", "attention")).rewrite(rw)
        return rw.done()

    return model


def on_disk(model: Model) -> Model:
    lazy = model.clone()
    lazy.weights = {name: resident(tensor) for name, tensor in model.tensors().items()}
    lazy.release()
    return lazy


@pytest.mark.parametrize("kind", FORMATS)
def test_the_verdict_says_that_no_consumer_ran(
    kind: str, made: Callable[[str], Model], tmp_path: Path
) -> None:
    place = tmp_path / "out"
    verdict = FORMATS[kind](path=str(place)).publish(on_disk(made(kind)))
    assert place.is_dir()
    assert verdict.error <= 1e-6
    assert "too large here for" in verdict.consumer
    assert f"`effc verify --deep {place}`" in verdict.consumer
    assert "effc compared" in verdict.consumer


@pytest.mark.parametrize("kind", FORMATS)
def test_one_changed_number_is_found(
    kind: str, made: Callable[[str], Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = FORMATS[kind].write

    def damaged(self: Export, model: Model, place: Path) -> None:
        write(self, model, place)
        [file] = [path for path in place.glob("*.safetensors")]
        content = bytearray(file.read_bytes())
        content[-3] ^= 0x40
        file.write_bytes(content)

    monkeypatch.setattr(FORMATS[kind], "write", damaged)
    with pytest.raises(EffcError) as caught:
        FORMATS[kind](path=str(tmp_path / "out")).publish(on_disk(made(kind)))
    assert caught.value.diagnostics[0].code in ("E443", "E552")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["hf", "compressed_tensors"])
def test_a_changed_config_is_found(
    kind: str, made: Callable[[str], Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = FORMATS[kind].write

    def damaged(self: Export, model: Model, place: Path) -> None:
        write(self, model, place)
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))

    monkeypatch.setattr(FORMATS[kind], "write", damaged)
    with pytest.raises(EffcError) as caught:
        FORMATS[kind](path=str(tmp_path / "out")).publish(on_disk(made(kind)))
    assert "rms_norm_eps" in caught.value.diagnostics[0].notes[0]


@pytest.mark.parametrize("kind", ["artifact", "hf"])
def test_few_weights_are_in_memory_at_once(kind: str, made: Callable[[str], Model], tmp_path: Path) -> None:
    model = made("hf")
    books = Counted()
    verdict = FORMATS[kind](path=str(tmp_path / "out")).publish(books.on_disk(model))
    whole = sum(t.numel() * 4 for t in model.tensors().values())
    assert "too large" in verdict.consumer
    assert 0 < books.most < whole / 2
