"""Artefacts whose JSON, weights or kernels were edited, with the manifest brought in line or not."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from effc.runtime import artifact, cli_result
from effc.runtime.generate import generate
from effc.runtime.kernel_texts import kernel_texts
from effc.runtime.load import load
from effc.runtime.verify import verify
from tests.trust.hostile import Spoil, refused, resign, sound

Edit = Callable[[dict[str, Any]], object]
IDS = torch.arange(6)[None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An artefact that loads, with a kernel that would leave a trace if anything ran it."""
    trace = tmp_path / "ran"
    kernel = f"open({str(trace)!r}, 'w').close()\n"
    story = artifact.Story(
        "effc 1\n", {"seed": 0}, (("thin", "remove", "layers.1", ""),), kernels={"w4.py": kernel}
    )
    artifact.write(load(sound(tmp_path / "model")), tmp_path / "small.effc", story)
    return tmp_path / "small.effc"


def _graph(edit: Edit, name: str = "model.json") -> Spoil:
    """Edit a JSON file and bring the manifest in line."""

    def spoil(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        edit(value)
        (folder / name).write_text(json.dumps(value))
        resign(folder, name)

    return spoil


def _manifest(edit: Edit) -> Spoil:
    def spoil(folder: Path) -> None:
        value = json.loads((folder / "manifest.json").read_text())
        edit(value)
        (folder / "manifest.json").write_text(json.dumps(value))

    return spoil


def _unsigned(name: str, content: bytes) -> Spoil:
    """Change a file in place, same length, manifest untouched."""

    def spoil(folder: Path) -> None:
        old = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(old)].ljust(len(old)))

    return spoil


def _moved(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        os.rename(folder / name, folder.parent / "outside")
        (folder / name).symlink_to(folder.parent / "outside")

    return spoil


def _reweighted(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["norm.weight"] = torch.zeros(99)
    save_file(tensors, folder / "model.safetensors")
    resign(folder, "model.safetensors")


def _half(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t.half() for n, t in tensors.items()}, folder / "model.safetensors")
    resign(folder, "model.safetensors")


def _text(name: str, text: bytes) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(text)
        if name != "manifest.json":
            resign(folder, name)

    return spoil


def _unit(**changes: Any) -> Spoil:
    return _graph(lambda g: g["modules"]["norm"].update(changes))


CASES: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "model.json edited": (_unsigned("model.json", b"{}"), ("E443",)),
    "tokenizer edited": (_unsigned("tokenizer.json", b"{}"), ("E443",)),
    "format 2": (_graph(lambda g: g.update(format=2)), ("E406",)),
    "a unit that is a module of Python": (_unit(type="os.system"), ("E406",)),
    "a unit that is a class of torch": (_unit(type="Module"), ("E406",)),
    "a unit that is the base": (_unit(type="Unit"), ("E406",)),
    "a unit with an unknown argument": (_unit(command="id"), ("E406",)),
    "a unit with a list for a number": (_unit(width=[1]), ("E406",)),
    "a unit of 2^40 channels": (_unit(width=2**40), ("E406",)),
    "a unit of 2^30 channels": (_unit(width=2**30), ("E406", "E444")),
    "a unit with a dtype that is code": (_unit(dtype="__class__"), ("E406",)),
    "a block called __class__": (
        _graph(lambda g: g["modules"].update({"__class__": {"type": "Norm"}})),
        ("E406",),
    ),
    "a block that shadows forward": (
        _graph(lambda g: g["modules"].update({"forward": {"type": "Norm", "width": 4}})),
        ("E406",),
    ),
    "a block with code in its name": (
        _graph(lambda g: g["modules"].update({"a'); import os #": {"type": "Norm", "width": 4}})),
        ("E406",),
    ),
    "a block nothing calls": (
        _graph(lambda g: g["modules"].update({"spare": {"type": "Norm", "width": 4}})),
        ("E406",),
    ),
    "nodes that read later ones": (_graph(lambda g: g["nodes"][2].__setitem__(2, [9, 1])), ("E406",)),
    "nodes that call a function": (
        _graph(lambda g: g["nodes"].insert(3, ["call", "os.system", [0]])),
        ("E406",),
    ),
    "a million nodes": (_graph(lambda g: g.update(nodes=[["input", "ids"]] * 1_000_000)), ("E406", "E444")),
    "no nodes": (_graph(lambda g: g.update(nodes=[])), ("E406",)),
    "modules as a list": (_graph(lambda g: g.update(modules=[])), ("E406",)),
    "a tie to nothing": (_graph(lambda g: g["ties"].update({"head.weight": "ghost.weight"})), ("E406",)),
    "a tie of other shapes": (_graph(lambda g: g["ties"].update({"head.weight": "norm.weight"})), ("E406",)),
    "a role of no module": (_graph(lambda g: g["roles"].update(ghost=["norm", None])), ("E406",)),
    "a role that does not exist": (_graph(lambda g: g["roles"].update(norm=["boss", None])), ("E406",)),
    "facts as text": (_graph(lambda g: g.update(facts="all")), ("E444",)),
    "model.json nested deep": (_text("model.json", b"[" * 200_000), ("E414",)),
    "model.json with a key twice": (_text("model.json", b'{"format": 1, "format": 1}'), ("E414",)),
    "weights of another shape": (_reweighted, ("E444",)),
    "weights of another dtype": (_half, ("E444",)),
    "weights replaced by a link": (_moved("model.safetensors"), ("E416",)),
    "structure replaced by a link": (_moved("model.json"), ("E416",)),
    "a kernel replaced by a link": (_moved("tokenizer.json"), ("E416",)),
    "manifest that lists a file above": (
        _manifest(lambda m: m["files"].update({"../x": [1, "0" * 64]})),
        ("E416",),
    ),
    "manifest with an absolute path": (
        _manifest(lambda m: m["files"].update({"/etc/passwd": [1, "0" * 64]})),
        ("E416",),
    ),
    "manifest that lists a lost file": (
        _manifest(lambda m: m["files"].update({"gone.json": [1, "0" * 64]})),
        ("E443",),
    ),
    "manifest with a negative size": (
        _manifest(lambda m: m["files"].update({"model.json": [-1, "0" * 64]})),
        ("E444",),
    ),
    "manifest with a hash that is none": (
        _manifest(lambda m: m["files"].update({"model.json": [1, "$(id)"]})),
        ("E444",),
    ),
    "manifest without the structure": (_manifest(lambda m: m["files"].pop("model.json")), ("E444",)),
    "manifest without the weights": (_manifest(lambda m: m["files"].pop("model.safetensors")), ("E443",)),
    "manifest of format 9": (_manifest(lambda m: m.update(format=9)), ("E444",)),
    "manifest that is a list": (_text("manifest.json", b"[]"), ("E444",)),
    "manifest nested deep": (_text("manifest.json", b"[" * 200_000), ("E414",)),
    "manifest with 300,000 files": (
        _manifest(lambda m: m.update(files={str(i): 0 for i in range(300_000)})),
        ("E444", "E414"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_edited_artefact_is_refused(case: str, folder: Path) -> None:
    spoil, codes = CASES[case]
    spoil(folder)
    with refused(*codes):
        load(folder)


@pytest.mark.parametrize(
    "edits", [7, ["a"], [["a", "b"]], [["a", "b", "c", {"d": 1}]]], ids=["number", "text", "short", "table"]
)
def test_edits_that_are_none_are_refused(edits: object, folder: Path) -> None:
    _text("edits.json", json.dumps(edits).encode())(folder)
    with refused("E444"):
        artifact.story(folder)


@pytest.mark.parametrize("signed", [False, True], ids=["hash as it was", "hash changed too"])
def test_kernel_text_never_runs(signed: bool, folder: Path) -> None:
    trace = folder.parent / "ran"
    assert not load(folder).materialize().is_meta
    kernel = folder / "kernels" / "w4.py"
    kernel.write_text(kernel.read_text().replace("close()", "write('x')"))
    if signed:
        resign(folder, "kernels/w4.py")
        load(folder).materialize()(IDS)
        assert artifact.check(folder) == []
        assert "write('x')" in artifact.story(folder).kernels["w4.py"]
    else:
        with refused("E443"):
            load(folder)
    assert not trace.exists()
    assert not list(folder.rglob("__pycache__"))


@pytest.mark.parametrize("lie", ["the text", "the text and its key in the lock", "the specs in the lock"])
def test_an_edited_program_never_runs_and_is_told(
    lie: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """C that would leave a trace when it is loaded; hashes, and even the lock, are brought in line."""
    texts, chosen = kernel_texts(load(sound(tmp_path / "model")))
    folder, trace = tmp_path / "small.effc", tmp_path / "ran"
    story = artifact.Story(lock={"kernels": chosen}, kernels=texts)
    artifact.write(load(tmp_path / "model"), folder, story)
    due = generate(load(folder).materialize(), IDS, max_new_tokens=3, kernels="c")
    assert told(folder) == (True, "kernels/program.c")

    spoilt = f"""{texts["program.c"]}
#include <stdio.h>
__attribute__((constructor)) static void leave(void) {{ fclose(fopen("{trace}", "w")); }}
"""
    if "text" in lie:
        (folder / "kernels" / "program.c").write_text(spoilt)
        resign(folder, "kernels/program.c")
    lock = {"program": hashlib.sha256(spoilt.encode()).hexdigest()[:16]} if "key" in lie else {}
    lock |= {"specs": {"\x1b[2J": {"op": "system"}}} if "specs" in lie else {}
    _graph(lambda g: g["kernels"].update(lock), "lock.json")(folder)

    assert torch.equal(generate(load(folder).materialize(), IDS, max_new_tokens=3, kernels="c"), due)
    by = {"the text": "was edited", "the specs in the lock": "other kernels than are chosen here"}
    words = by.get(lie, "was written by another version")
    assert told(folder)[0] is None
    assert words in told(folder)[1]
    assert verify(folder)["holds"]
    asked = argparse.Namespace(model=str(folder), kernels="c", isa=None)
    assert cli_result._choice(load(folder), asked).kernels == "c"
    said = capsys.readouterr().err
    assert words in said
    assert "\x1b" not in said
    assert not trace.exists()


def told(folder: Path) -> tuple[bool | None, str]:
    """What `effc verify` says about kept kernels."""
    found = {c["what"]: (c["holds"], c["detail"]) for c in verify(folder)["checks"]}
    return found["kernels are those that run here"]


def test_weights_changed_in_place_are_found_by_check(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert [d.code for d in artifact.check(folder)] == ["E443"]
