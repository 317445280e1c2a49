"""Verifying and explaining an artefact: whole, changed on disk, or not what its lock says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from effc.compiler.cost import count
from effc.runtime import artifact
from effc.runtime.cli import main
from effc.runtime.exports._export import Verdict
from effc.runtime.exports.hf import Hf
from effc.runtime.load import load
from effc.runtime.story import explained, explained_text
from effc.runtime.verify import verify, verify_text
from effc.specs.diagnostic import EffcError

from .doubles import tiny


def written(folder: Path, **lies: Any) -> Path:
    """An artefact of a tiny model; `lies` replace what its lock says."""
    model = tiny()
    cost = count(model, 512)
    stage = {"name": "small", "params": cost.params, "bytes": cost.bytes, "loss": {}, **lies}
    made: Mapping[str, Any] = {
        **{
            "name": "small",
            "method": "quantize.rtn",
            "inputs": ["base"],
            "bytes": cost.bytes,
            "seconds": 1.5,
        },
        "contract": {"fidelity": "LOSSY", "error": 0.03, "held": True},
        "selected": [["mlp.up", "layers 0-1", "bits = 4"]],
        "errors": {"layers.0.mlp.up": 0.02},
    }
    story = artifact.Story(
        lock={"model": "small", "stages": [{**stage, "parts": {"arguments": {"bits": 4}}}]},
        edits=(
            ("small", "swap", "layers.0.mlp.up", "Linear -> QuantLinear"),
            ("thin", "drop", "layers.1", ""),
        ),
        report={"stages": [made]},
    )
    artifact.write(model, folder, story)
    return folder


def test_a_whole_artefact_holds(tmp_path: Path) -> None:
    record = verify(written(tmp_path / "a.effc"))
    assert record["holds"]
    assert {c["what"]: c["holds"] for c in record["checks"]} == {
        "files are those of the manifest": True,
        "structure and weights fit": True,
        "params": True,
        "bytes": True,
    }
    assert "the artefact is what it says" in verify_text(record)


def test_a_changed_weight_fails_by_its_file(tmp_path: Path) -> None:
    folder = written(tmp_path / "a.effc")
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    record = verify(folder)
    assert not record["holds"]
    assert "model.safetensors" in record["checks"][0]["detail"]


def test_a_lock_that_lies_about_the_size_fails(tmp_path: Path) -> None:
    record = verify(written(tmp_path / "a.effc", bytes=1))
    assert not record["holds"]
    assert "the lock says 1" in next(c["detail"] for c in record["checks"] if c["what"] == "bytes")


def test_the_command_exits_3_when_the_artefact_is_not_what_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(written(tmp_path / "good.effc"))]) == 0
    assert main(["verify", "--json", str(written(tmp_path / "bad.effc", params=7))]) == 3
    said = capsys.readouterr().out
    assert json.loads(said[said.index("{") :])["holds"] is False


def test_a_folder_that_is_no_artefact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EffcError):
        verify(tmp_path)


def test_a_stage_is_explained_from_the_artefact_alone(tmp_path: Path) -> None:
    folder = written(tmp_path / "a.effc")
    record = explained(folder, None)
    assert record["log"] == [["swap", "layers.0.mlp.up", "Linear -> QuantLinear"]]
    text = explained_text(record)
    for part in ("small: quantize.rtn of base", "bits = 4", "contract LOSSY", "1 edit", "layers.0.mlp.up"):
        assert part in text
    with pytest.raises(EffcError) as caught:
        explained(folder, "smal")
    assert caught.value.diagnostics[0].code == "E683"


def test_an_export_is_held_to_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hf, "verify", lambda self, place, model: Verdict("nobody", 0.0, 1.0))
    monkeypatch.setattr(Hf, "ready", lambda self: None)
    place = tmp_path / "hf"
    Hf(path=str(place)).publish(load("zoo:pylm"))
    record = verify(place, deep=True)
    assert record["holds"]
    assert [c["what"] for c in record["checks"]] == [
        "files are those of the export",
        "headers and index of the weights",
        "config and weights fit",
        "a fresh process computes the same",
    ]
    assert verify_text(record).endswith("the export is what it says")
    config = place / "config.json"
    config.write_text(config.read_text().replace("256", "257"))
    record = verify(place)
    assert not record["holds"]
    assert record["checks"][0]["detail"] == "config.json"


def test_what_effc_did_not_write_is_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(EffcError) as caught:
        verify(tmp_path / "nothing")
    assert caught.value.diagnostics[0].code == "E441"
    (tmp_path / "effc.json").write_text('{"export": "hf", "files": {"../x": [1, ""]}}')
    with pytest.raises(EffcError) as caught:
        verify(tmp_path)
    assert caught.value.diagnostics[0].code == "E416"
