"""Folders that exports publish: whole or not at all, never over what no export made, read again equal."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from effc.compiler.model import Model, TokenizerFiles
from effc.compiler.rewrite import Rewriter
from effc.passes.quantize.rtn import RTN
from effc.runtime import artifact
from effc.runtime.exports import _export
from effc.runtime.exports._export import Verdict
from effc.runtime.exports.artifact import Artifact
from effc.runtime.exports.hf import Hf
from effc.runtime.load import load
from effc.specs.diagnostic import EffcError
from tests.trust.hostile import sound

FILES = {"tokenizer.json": b"{}", "chat_template.jinja": b"{{ messages }}", "generation_config.json": b"{}"}
IDS = torch.arange(12).view(2, 6)


@pytest.fixture
def model(tmp_path: Path) -> Model:
    found = load(sound(tmp_path / "model")).materialize()
    found.tokenizer = TokenizerFiles(FILES)
    return found


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Publish without starting a consumer."""
    verdict = Verdict("nobody", 0.0, 1.0)
    for kind in (Artifact, Hf):
        monkeypatch.setattr(kind, "verify", lambda self, place, model: verdict)


def code(caught: pytest.ExceptionInfo[EffcError]) -> list[str]:
    return [d.code for d in caught.value.diagnostics]


def test_transformers_verifies_a_folder_in_a_fresh_process(model: Model, tmp_path: Path) -> None:
    verdict = Hf(path=str(tmp_path / "out" / "hf")).publish(model)
    assert verdict.consumer.startswith("transformers")
    assert verdict.error < 1e-5
    again = load(tmp_path / "out" / "hf").materialize()
    assert torch.equal(again(IDS), model(IDS))
    assert again.tokenizer == model.tokenizer
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["hf"]


def test_an_artefact_keeps_packed_weights_and_its_story(model: Model, tmp_path: Path, trusting: None) -> None:
    rw = Rewriter(model)
    RTN(bits=4, group=8).rewrite(rw)
    packed = rw.done()
    story = artifact.Story("effc 1\n", {"seed": 3}, (("small", "quantize", "layers.0.mlp.up", "4 bits"),))
    Artifact(path=str(tmp_path / "a.effc")).telling(story).publish(packed)
    again = load(tmp_path / "a.effc")
    assert again.is_meta
    assert torch.equal(again.materialize()(IDS), packed(IDS))
    assert again.tokenizer == packed.tokenizer
    assert artifact.story(tmp_path / "a.effc") == story
    assert artifact.check(tmp_path / "a.effc") == []


def test_only_what_an_export_made_is_replaced(model: Model, tmp_path: Path, trusting: None) -> None:
    target = tmp_path / "out"
    Hf(path=str(target)).publish(model)
    Hf(path=str(target)).publish(model)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(EffcError) as caught:
        Hf(path=str(mine)).publish(model)
    assert code(caught) == ["E561"]
    assert (mine / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(("number", "due"), [(errno.ENOSPC, "E601"), (errno.EROFS, "E602")])
def test_a_full_or_read_only_disk_leaves_the_old_folder(
    number: int, due: str, model: Model, tmp_path: Path, trusting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    Artifact(path=str(target)).publish(model)
    before = {p.name: p.read_bytes() for p in target.iterdir()}

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("effc.compiler.checkpoint_write.SafetensorsWriter.put", fail)
    with pytest.raises(EffcError) as caught:
        Artifact(path=str(target)).publish(model)
    assert code(caught) == [due]
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_a_consumer_that_disagrees_publishes_nothing(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(*_: object, **__: object) -> object:
        from effc.runtime.consumer import Answer

        return Answer(torch.zeros(2, 16, 32), torch.zeros(2, 0, dtype=torch.int64), "liar 1.0")

    monkeypatch.setattr("effc.runtime.exports.hf.ask", other)
    with pytest.raises(EffcError) as caught:
        Hf(path=str(tmp_path / "out")).publish(model)
    assert code(caught) == ["E552"]
    assert not (tmp_path / "out").exists()


def test_packed_weights_are_refused_with_what_fits(model: Model, tmp_path: Path) -> None:
    rw = Rewriter(model)
    RTN(bits=4, group=8).rewrite(rw)
    (problem,) = Hf(path=str(tmp_path / "out")).refuses(rw.done())
    assert problem.code == "E553"
    assert "compressed_tensors" in str(problem.help)
    assert "dense = true" in str(problem.help)
    assert Hf(path=str(tmp_path / "out"), dense=True).refuses(rw.done()) == ()
    assert _export.MARK == "effc.json"
