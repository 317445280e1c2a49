"""Poolers and task heads of a source: computed with by nobody here, and still there after a round trip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from effc.compiler.checkpoint import read_folder
from effc.compiler.checkpoint_write import write_folder
from effc.compiler.emitted import emitted, left_behind
from effc.compiler.exporter import stored_tensors
from effc.compiler.importer import import_folder
from effc.compiler.method import Outcome
from effc.compiler.model import Model
from effc.compiler.probe import probe
from effc.compiler.rewrite import Rewriter
from effc.passes.quantize.rtn import RTN
from effc.runtime import artifact
from effc.runtime.exports.compressed_tensors import CompressedTensors
from effc.runtime.exports.hf import Hf
from effc.runtime.smaller import smaller
from effc.runtime.store import Store

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_labels": 2,
}
BERT = SIZES | {"vocab_size": 61, "max_position_embeddings": 40}
VIT = SIZES | {"image_size": 12, "patch_size": 4}
HEADED: dict[str, tuple[dict[str, Any], set[str]]] = {
    "BertModel": (BERT, {"bert.pooler.dense"}),
    "BertForSequenceClassification": (BERT, {"bert.pooler.dense", "classifier"}),
    "BertForMaskedLM": (BERT, {"cls.predictions", "cls.predictions.transform.dense"}),
    "BertForQuestionAnswering": (BERT, {"qa_outputs"}),
    "ViTModel": (VIT, {"vit.pooler.dense"}),
    "ViTForImageClassification": (VIT, {"classifier"}),
}


def source(name: str, folder: Path) -> Any:
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    theirs = cls(cls.config_class(**HEADED[name][0])).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.2)
    theirs.save_pretrained(folder)
    return theirs


def answer(model: Any) -> Tensor:
    """What the whole model of transformers gives, its head included."""
    dice = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if "image_size" in model.config.to_dict():
            out = model(pixel_values=torch.randn(2, 3, 12, 12, generator=dice))
        else:
            out = model(input_ids=torch.randint(3, 61, (2, 9), generator=dice))
    for field in ("logits", "start_logits"):
        if field in out:
            return torch.as_tensor(out[field])
    return torch.as_tensor(out.pooler_output)


def written(model: Model, folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(emitted(model)))
    write_folder(folder, stored_tensors(model))
    return folder


@pytest.mark.parametrize("name", HEADED)
def test_heads_and_poolers_come_out_as_they_went_in(name: str, tmp_path: Path) -> None:
    theirs = source(name, tmp_path / "in")
    ours = import_folder(tmp_path / "in")
    carried = {n.rpartition(".")[0] for n in ours.beside}
    assert HEADED[name][1] <= carried
    out = written(ours.materialize(), tmp_path / "out")
    again, info = getattr(transformers, name).from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(answer(again.eval()), answer(theirs))


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "ViTForImageClassification"])
def test_they_pass_through_edits_the_store_and_an_artefact(name: str, tmp_path: Path) -> None:
    source(name, tmp_path / "in")
    first = import_folder(tmp_path / "in").materialize()
    wanted = {name: lazy.read() for name, lazy in first.beside.items()}
    rw = Rewriter(first)
    rw.remove_layers([1])
    kept = Store(tmp_path / "store").publish("0" * 64, Outcome(rw.done()), {}).model
    artifact.write(kept.materialize(), tmp_path / "model.effc")
    last = artifact.read(tmp_path / "model.effc")
    for model in (kept, last):
        assert model.beside.keys() == wanted.keys()
        assert all(torch.equal(model.beside[n].read(), t) for n, t in wanted.items())
    assert emitted(last)["architectures"] == [name]
    assert not artifact.check(tmp_path / "model.effc")


def test_the_content_of_a_head_is_part_of_what_a_result_is(tmp_path: Path) -> None:
    source("BertForSequenceClassification", tmp_path / "in")
    model = import_folder(tmp_path / "in").materialize()
    store = Store(tmp_path / "store")
    one = store.publish("1" * 64, Outcome(model), {}).fingerprint
    name = "classifier.weight"
    other = model.clone()
    changed = other.beside[name].read() + 1
    other.beside = {**other.beside, name: type(other.beside[name])((2, 32), torch.float32, lambda: changed)}
    assert store.publish("2" * 64, Outcome(other), {}).fingerprint != one


def test_a_head_for_another_vocabulary_is_named_and_left(tmp_path: Path) -> None:
    source("BertForMaskedLM", tmp_path / "in")
    model = import_folder(tmp_path / "in").materialize()
    assert not Hf(path="out").refuses(model)
    model.module("embedding").vocab = 50  # type: ignore[assignment]
    names = left_behind(model)
    assert "cls.predictions.bias" in names
    [warning] = Hf(path="out").refuses(model)
    assert warning.severity == "warning"
    assert warning.code == "W553"
    assert names[0] in warning.notes


def test_a_small_copy_has_no_head_and_names_no_class_that_needs_one(tmp_path: Path) -> None:
    source("ViTForImageClassification", tmp_path / "in")
    small = smaller(import_folder(tmp_path / "in")).materialize()
    assert emitted(small)["architectures"] == ["ViTModel"]
    assert not [n for n in read_folder(written(small, tmp_path / "out")) if "classifier" in n]


def test_packing_leaves_heads_dense_and_says_so(tmp_path: Path) -> None:
    source("BertForSequenceClassification", tmp_path / "in")
    rw = Rewriter(import_folder(tmp_path / "in").materialize())
    RTN(bits=8, group=16).rewrite(rw)
    packed = rw.done()
    CompressedTensors(path=str(tmp_path / "out")).write(packed, tmp_path / "out")
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert {"classifier", "bert.pooler.dense", "pooler.dense"} <= set(ignored)
    assert "classifier.weight" in read_folder(tmp_path / "out")


def test_the_probes_of_an_image_encoder_are_images(tmp_path: Path) -> None:
    source("ViTModel", tmp_path / "in")
    before = import_folder(tmp_path / "in").materialize()
    rw = Rewriter(before)
    rw.tie("layers.1.mlp.up", "layers.0.mlp.up")
    method = RTN(bits=8, group=16)
    method.rewrite(rw)
    error = probe(method, before, rw.done()).error
    assert 0 < error < 1
