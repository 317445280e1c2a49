"""The commands about finished models and the catalogue, through the command line: what scripts rely on."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from effc.runtime.cli import main
from effc.runtime.kernel_table import kernels_of
from tests.passes.gpu_models import llama, packed

from .workplace import Workplace

RECIPE = """effc 1
recipe little

param bits = 4

model base = new(llama, tokenizer = "HERE/tok", layers = 2, width = 32, hidden = 64, heads = 4, dtype = fp32)
data  code = text("HERE/text/*.txt", seq = 32)

small = quantize.rtn(base, bits = bits, group = 32)

expect small.bytes < base.bytes
expect small.loss(code) <= base.loss(code) + 50%

export base as artifact("HERE/out/base.effc")
export small as artifact("HERE/out/small.effc")
"""

COMPILED = {"recipe", "stages", "expects", "exports"}
STAGE = {
    *("name", "method", "params", "bytes", "flops_per_token", "kv_bytes_per_token"),
    *("peak_bytes", "seconds", "cached", "contract"),
}
LISTED = {"name", "family", "summary", "paper", "contract", "parameters"}
PARAMETER = {"name", "type", "unit", "default", "range", "description"}


class Built:
    """A recipe compiled once, its artefacts, and what `plan --json` and `compile --json` printed."""

    def __init__(self, folder: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.recipe = Workplace(folder).write(RECIPE.replace("HERE", str(folder)))
        self.base, self.small = folder / "out" / "base.effc", folder / "out" / "small.effc"
        store = ["--store", str(folder / "store")]
        self.planned = _json(capture, "plan", str(self.recipe), *store)
        self.compiled = _json(capture, "compile", str(self.recipe), *store)


_built: list[Built] = []


@pytest.fixture
def built(tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]) -> Built:
    """One for the module; made by the first test that asks, as `capsys` belongs to a test."""
    if not _built:
        _built.append(Built(tmp_path_factory.mktemp("cli"), capsys))
    capsys.readouterr()
    return _built[0]


def _json(capture: pytest.CaptureFixture[str], *words: str, code: int = 0) -> Any:
    """What a command prints with --json: JSON alone."""
    capture.readouterr()
    assert main([*words, "--json"]) == code
    return json.loads(capture.readouterr().out)


def _texts(capture: pytest.CaptureFixture[str], built: Built, *words: str) -> list[str]:
    told = _json(capture, "run", str(built.small), "--max-new-tokens", "12", *words)
    return [each["text"] for each in told]


def test_greedy_text_is_the_same_twice_and_follows_the_prompt(
    built: Built, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--prompt", "def f1(")
    (text,) = _texts(capsys, built, *words)
    assert text
    assert _texts(capsys, built, *words) == [text]
    assert main(["run", str(built.small), "--max-new-tokens", "12", *words]) == 0
    assert capsys.readouterr().out == f"def f1({text}\n"


def test_a_prompt_in_a_batch_reads_as_it_does_alone(
    built: Built, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    prompts = ["def f1(", "return", "first + 3 * second and then some more of it"]
    listed = tmp_path / "prompts.txt"
    listed.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    batch = _texts(capsys, built, "--prompts", str(listed))
    alone = [_texts(capsys, built, "--prompt", prompt)[0] for prompt in prompts]
    assert batch == alone
    assert len(set(batch)) > 1


@pytest.mark.parametrize("limit", [(), ("--top-k", "8"), ("--top-p", "0.9")], ids=["all", "top-k", "top-p"])
def test_a_seed_fixes_what_is_drawn(
    limit: tuple[str, ...], built: Built, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = ("--prompt", "def f1(", "--temperature", "1", *limit)
    first = _texts(capsys, built, *drawn, "--seed", "1")
    assert _texts(capsys, built, *drawn, "--seed", "1") == first
    assert _texts(capsys, built, *drawn, "--seed", "2") != first


def test_one_likeliest_token_is_the_greedy_one(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    greedy = _texts(capsys, built, "--prompt", "def f1(")
    assert _texts(capsys, built, "--prompt", "def f1(", "--temperature", "1", "--top-k", "1") == greedy


def test_a_good_artefact_holds_when_it_is_measured_again(
    built: Built, capsys: pytest.CaptureFixture[str]
) -> None:
    record = _json(capsys, "verify", str(built.small), "--deep")
    assert record["holds"]
    checks = {check["what"]: check["holds"] for check in record["checks"]}
    assert checks["loss(code)"] is True
    assert checks["a fresh process computes the same"] is True


@pytest.mark.parametrize("deep", [(), ("--deep",)], ids=["quick", "deep"])
def test_a_flipped_weight_byte_fails_by_its_file(
    deep: tuple[str, ...], built: Built, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.effc"
    shutil.copytree(built.small, broken)
    weights = next(broken.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert main(["verify", str(broken), *deep]) == 3
    said = capsys.readouterr().out
    assert "the artefact is NOT what it says" in said
    assert weights.name in said


def test_a_stage_of_an_artefact_is_explained(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(built.small), "small"]) == 0
    said = capsys.readouterr().out
    assert "quantize.rtn of base" in said
    assert "bits = 4" in said
    assert main(["explain", str(built.small), "smal"]) == 1
    assert "error[E683]" in capsys.readouterr().err


def test_why_an_artefact_has_no_launches_is_told_without_a_gpu(
    built: Built, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton", reason="Triton has builds for Linux only")
    assert main(["explain", str(built.small), "--kernels", "triton"]) == 0
    said = capsys.readouterr().out
    assert "no Triton kernels, so torch runs the model: `layers.0.attention" in said
    assert "kernels, on a CPU" not in said


def test_launches_are_named_without_a_gpu() -> None:
    pytest.importorskip("triton", reason="Triton has builds for Linux only")
    rows = kernels_of(packed(llama(), bits=4, group=64), "int8")["rows"]
    heads = next(row for row in rows if row["nodes"] == "attention.q, k, v")
    assert heads["where"] == "layers 0-1"
    assert heads["kernel"].startswith("byte_linear ")
    assert rows[0]["why"] == "rows of a table, looked up by torch"


def test_a_method_is_explained_in_the_words_of_the_language(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "quantize.gptq"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"order +true or false += false ", said)
    assert main(["explain", "merge.linear"]) == 0
    said += capsys.readouterr().out
    assert re.search(r"normalize .*= true ", said)
    assert not re.search(r"= (True|False|None)\b", said)


def test_models_differ_in_what_a_stage_did(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    record = _json(capsys, "diff", str(built.base), str(built.small))
    sizes = [next(s["bytes"] for s in built.compiled["stages"] if s["name"] == n) for n in ("base", "small")]
    assert record["cost"]["bytes"] == sizes
    named = {change["name"] for change in record["tensors"]}
    assert any("mlp.up" in name for name in named)
    assert not any("norm" in name for name in named)
    assert _json(capsys, "diff", str(built.small), str(built.small))["tensors"] == []


def test_recipes_differ_in_meaning_and_not_in_layout(
    built: Built, capsys: pytest.CaptureFixture[str]
) -> None:
    text = built.recipe.read_text(encoding="utf-8")
    spread, other = (built.recipe.with_name(f"{name}.effc") for name in ("spread", "other"))
    spread.write_text(text.replace("\n\n", "\n\n# a comment\n\n"), encoding="utf-8")
    other.write_text(text.replace("bits = 4", "bits = 8"), encoding="utf-8")
    assert main(["diff", str(built.recipe), str(spread)]) == 0
    assert capsys.readouterr().out == "the recipes mean the same\n"
    lines = _json(capsys, "diff", str(built.recipe), str(other))["lines"]
    changed = [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert changed
    assert all("4" in line or "8" in line for line in changed)


def test_the_list_of_methods_has_the_fixed_shape(capsys: pytest.CaptureFixture[str]) -> None:
    listed = _json(capsys, "methods")
    names = [each["name"] for each in listed]
    assert len(names) == len(set(names))
    assert {"train.optimizer.lion", "train.schedule.wsd", "quantize.gptq", "merge.ties"} <= set(names)
    assert not [name for name in names if name.startswith("lower.")]
    for each in listed:
        assert each.keys() == LISTED
        assert each["paper"] == "folklore" or re.search(r", (19|20)\d\d\b", each["paper"])
        assert each["name"].startswith(f"{each['family']}.")
        for parameter in each["parameters"]:
            assert parameter.keys() == PARAMETER


def test_a_plan_and_a_compile_share_one_shape(built: Built) -> None:
    for record in (built.planned, built.compiled):
        assert record.keys() >= COMPILED
        assert [stage["name"] for stage in record["stages"]] == ["base", "small"]
        assert all(stage.keys() >= STAGE for stage in record["stages"])
    for expected, measured in zip(built.planned["stages"], built.compiled["stages"], strict=True):
        for key in ("name", "method", "params", "bytes", "flops_per_token", "kv_bytes_per_token"):
            assert expected[key] == measured[key], key
    for key in ("expects", "exports"):
        assert len(built.planned[key]) == len(built.compiled[key]) == 2
    assert [e["path"] for e in built.planned["exports"]] == [os.fspath(p) for p in (built.base, built.small)]


def test_json_holds_the_warnings_of_the_language_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unused = RECIPE + 'data more = text("HERE/text/1.txt")\n'
    recipe = Workplace(tmp_path).write(unused.replace("HERE", str(tmp_path)))
    planned = _json(capsys, "plan", str(recipe), "--store", str(tmp_path / "store"))
    assert "W201" in {warning["code"] for warning in planned["warnings"]}
