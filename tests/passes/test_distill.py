"""Distillation: a student nears its teacher; what the teacher said offline is worth what it says online."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from effc.compiler.method import Context
from effc.compiler.model import Model, TokenizerFiles
from effc.passes.adapt.full import Full
from effc.passes.distill.logits import Logits
from effc.passes.distill.offline import Offline
from effc.runtime.data._packed import Packed
from effc.runtime.data.text import Text
from effc.runtime.fit import fit
from effc.runtime.parts.train.optimizer.adamw import AdamW
from effc.specs.recipe import Ref
from tests.runtime.doubles import Memory, tiny

FORMS: dict[str, Any] = {"data": Ref("code"), "steps": 10, "batch": 4, "optimizer": AdamW(lr=3e-3)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    folder = tmp_path_factory.mktemp("text")
    for i in range(12):
        body = "".join(f"def f{i * j % 7}(a{i}, b):\n    return a{i} + b\n" for j in range(20))
        (folder / f"{i}.py").write_text(f"# file {i}\n{body}")
    return Text(path=str(folder), seq=32).open(dict(tiny().tokenizer.files))  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def teacher(data: Packed) -> Model:
    return fit(Full(**FORMS | {"steps": 40}), tiny(), Context(data={"data": data})).model


def distilled(method: Logits | Offline, data: Packed, teacher: Model, **more: Any) -> Any:
    return fit(
        method, tiny(layers=1, seed=5), Context(data={"data": data}, models={"teacher": teacher}, **more)
    )


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd", "tvd"])
def test_every_direction_nears_the_teacher(data: Packed, teacher: Model, direction: str) -> None:
    before = {n: t.clone() for n, t in teacher.tensors().items()}
    method = Logits(teacher=Ref("base"), direction=direction, **FORMS | {"steps": 25})
    told = distilled(method, data, teacher).measures["curve"]["losses"]["kd"]
    assert told[-1] < 0.8 * told[0]
    assert all(torch.equal(before[n], t) for n, t in teacher.tensors().items())


def test_the_teacher_itself_has_nothing_to_learn(data: Packed, teacher: Model) -> None:
    batch = data.batch("train", [0, 1])
    told = Logits(teacher=Ref("base"), **FORMS).loss(teacher, {"teacher": teacher}, batch)
    assert abs(float(told["kd"])) < 1e-5


def test_all_tokens_kept_in_full_are_the_teacher_online(data: Packed, teacher: Model) -> None:
    forms = FORMS | {"precision": "fp32", "steps": 5}
    online = distilled(Logits(teacher=Ref("base"), **forms), data, teacher).measures["curve"]
    method = Offline(teacher=Ref("base"), k=300, stored="fp32", **forms)
    offline = distilled(method, data, teacher).measures["curve"]
    assert offline["losses"]["kd"] == pytest.approx(online["losses"]["kd"], abs=2e-5)


def test_the_bucket_bounds_the_distance_from_below(data: Packed, teacher: Model) -> None:
    student, batch = tiny(layers=1, seed=5), data.batch("train", [0, 1])
    with torch.no_grad():
        z_s = student(batch.ids, step=batch.step)[0]
        logp = torch.log_softmax(teacher(batch.ids, step=batch.step)[0], -1)
    whole = (logp.exp() * (logp - torch.log_softmax(z_s, -1))).sum(-1)
    last = torch.zeros(len(whole))
    for k in (4, 16, 64, 299):
        top = logp.topk(k)
        found = Offline(teacher=Ref("base"), k=k, **FORMS).distance(z_s, top.indices, top.values)
        assert bool((found <= whole + 1e-4).all())
        assert bool((found >= last - 1e-4).all())
        last = found


def test_what_was_captured_is_not_asked_again(data: Packed, teacher: Model) -> None:
    method, journal = Offline(teacher=Ref("base"), k=8, **FORMS), Memory()
    first = distilled(method, data, teacher, journal=journal)
    kept = {name: unit for name, unit in journal.units.items() if name.startswith("teacher")}
    assert sum(t[0]["logp"].nbytes for t in kept.values()) == sum(
        t[0]["sequences"].numel() * 8 * 2 for t in kept.values()
    )
    journal.units = dict(kept)
    silent = tiny(seed=9)
    again = distilled(method, data, silent, journal=journal)
    assert first.measures == again.measures


def test_vocabularies_that_differ_are_refused() -> None:
    student, other = tiny(), tiny()
    files = dict(other.tokenizer.files)  # type: ignore[union-attr]
    raw = files["tokenizer.json"].replace(b'"a":', b'"b\xc4\x80":')
    other.tokenizer = TokenizerFiles(files | {"tokenizer.json": raw})
    for method in (Logits(teacher=Ref("base"), **FORMS), Offline(teacher=Ref("base"), **FORMS)):
        assert not method.refuses(student, [tiny(seed=4)])
        assert [d.code for d in method.refuses(student, [other])] == ["E652"]


@pytest.mark.parametrize("wrong", [{"temperature": 0}, {"kd": 0}, {"beta": 1}, {"direction": "sideways"}])
def test_arguments_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Logits(teacher=Ref("base"), **FORMS | wrong)
