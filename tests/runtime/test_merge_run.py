"""A recipe that only merges: one file, written once, compared by its header; it goes on where it stopped."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from effc.compiler.architecture import architecture
from effc.compiler.checkpoint_write import SafetensorsWriter
from effc.compiler.importer import build, import_folder
from effc.compiler.model import Model
from effc.compiler.places import places
from effc.runtime import merge
from effc.runtime.compiled import Compiled
from effc.runtime.exports._export import Verdict
from effc.runtime.exports.hf import Hf
from effc.runtime.front import parse, plan
from effc.runtime.progress import Event
from effc.runtime.run import compile
from effc.runtime.store import Store

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "tie_word_embeddings": False,
}
LINEAR = "m = merge.linear([a, b])"


@pytest.fixture(autouse=True)
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        checkpoint(tmp_path / name, seed)


def checkpoint(folder: Path, seed: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """A random llama of a few thousand weights."""
    family = architecture("llama")
    model = build(family, CONFIG, dtype)
    shapes = {p.name: tuple(model.tensors()[n].shape) for n, p in places(family, model).items()}
    draw = torch.Generator().manual_seed(seed)
    folder.mkdir()
    with SafetensorsWriter(folder / "model.safetensors", {n: (s, dtype) for n, s in shapes.items()}) as file:
        for name, shape in shapes.items():
            file.put(name, torch.randn(shape, generator=draw).to(dtype))
    (folder / "config.json").write_text(json.dumps(CONFIG))


def recipe(call: str, export: str = 'export m as hf("out")') -> Path:
    path = Path("t.effc")
    path.write_text(f'effc 1\nrecipe t\nmodel a = load("a")\nmodel b = load("b")\n{call}\n{export}\n')
    return path


def compiled(call: str = LINEAR, store: str = "store", **more: Any) -> Compiled:
    return compile(parse(recipe(call)), Store(Path(store)), **more)


def refuse(*_: object, **__: object) -> Any:
    raise AssertionError("a merge builds no model and starts no consumer")


def test_store_and_export_share_the_file_that_the_merge_wrote(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SafetensorsWriter, "put", refuse)
    done = compiled()
    (bundle,) = Path("store/bundles").iterdir()
    assert os.path.samefile(bundle, "out/model.safetensors")
    assert list(Path("store/work").iterdir()) == []
    a, b, m = (import_folder(Path(name)).materialize().tensors() for name in ("a", "b", "out"))
    assert all(torch.equal(m[n], ((a[n].float() + b[n].float()) / 2).to(a[n].dtype)) for n in m)
    assert done.exit_code == 0


def test_the_form_of_the_file_is_no_part_of_the_result() -> None:
    alone = compiled(store="first").stage("m").fingerprint
    used = compiled("m = merge.linear([a, b])\nn = merge.linear([m, a])", store="second")
    assert used.stage("m").fingerprint == alone
    assert not Path("second/bundles").exists()


def test_a_large_merge_builds_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effc.compiler.around.LIGHT", 0)
    monkeypatch.setattr(Model, "materialize", refuse)
    monkeypatch.setattr(Hf, "verify", refuse)
    done = compiled()
    assert done.stage("m").contract["fidelity"] == "LOSSY"
    assert done.stage("m").latency is None
    assert "header, index and config" in str(done.exports[0].verified)
    assert "effc verify --deep out" in str(done.exports[0].verified)


def test_the_consumer_loads_what_has_no_equal_among_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def verify(self: Hf, place: Path, model: Model) -> Verdict:
        said.append(place.name)
        return Verdict("a reader", 0.0, 0.0)

    monkeypatch.setattr(Hf, "verify", verify)
    compiled()
    assert said == []
    whole = Hf(path="other")
    model = import_folder(Path("a"))
    Path("a/config.json").write_text(json.dumps(CONFIG | {"rms_norm_eps": 1e-3}))
    whole.publish(model, [import_folder(Path("a"))])
    assert said == ["other"], "the config says something else"
    whole.publish(import_folder(Path("a"), torch.float32), [import_folder(Path("a"))])
    assert said == ["other", "other"], "the tensors have another dtype"
    whole.publish(import_folder(Path("a")), [])
    assert len(said) == 3, "nothing to compare with"


@pytest.mark.parametrize("lost", [False, True], ids=["stopped", "with its file lost"])
def test_a_merge_that_was_stopped_goes_on_to_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    monkeypatch.setattr(merge, "UNIT", 4000)
    compiled(store="whole")
    want = Path("out/model.safetensors").read_bytes()
    Path("out/model.safetensors").unlink()

    def stop(event: Event) -> None:
        if event.what == "progress" and event.done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compiled(observers=[stop])
    (work,) = Path("store/work").iterdir()
    assert list(work.glob("units/merge-*"))
    if lost:
        (work / "spill/result-00000.safetensors").unlink()
    seen: list[Event] = []
    compiled(observers=[seen.append])
    assert any(event.what == "resumed" for event in seen)
    assert Path("out/model.safetensors").read_bytes() == want


@pytest.mark.parametrize("method", ["ties", "dare_ties", "task_arithmetic"])
def test_weights_are_counted_without_the_base(method: str) -> None:
    call = f"m = merge.{method}([b], base = a, weight = [2])"
    plan(parse(recipe(call)), Path("store"))
    assert compiled(call).exit_code == 0
