"""The analysis as recipes have it: what it says, what it refuses, and where its report goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import effc
from effc.compiler.findings import Findings
from effc.compiler.isolation import isolation
from effc.passes.analyze.batch_isolation import BatchIsolation
from effc.runtime.cli import main
from tests.claims import Measured
from tests.compiler.conftest import FAMILIES, fill
from tests.compiler.test_isolation import KEEPS, LEAKS, proof
from tests.runtime.workplace import Workplace

RECIPE = """effc 1
recipe apart "Packed, and proved to keep requests apart"

model base = new(llama, tokenizer = "tok", layers = 2, width = 32, hidden = 64, heads = 4, dtype = fp32)
data  code = text("text/*.txt", seq = 32)

small = quantize.rtn(base, bits = 8, group = 32)
apart = analyze.batch_isolation(small)

expect apart.findings <= 0

export small as artifact("small.effc")
"""


def test_it_says_what_was_followed() -> None:
    found = BatchIsolation(batch=3).analyze(fill(FAMILIES["gpt2"]()))
    assert found.holds
    assert found.words.startswith("no output row depends on another: ")
    assert "decode, padded rows" in found.words
    assert found.numbers["rows"] == 3
    assert Findings.from_json(json.loads(json.dumps(found.as_json()))) == found


def test_the_model_stays_as_it_is() -> None:
    model = fill(FAMILIES["mixtral"]())
    before = {name: t.clone() for name, t in model.tensors().items()}
    BatchIsolation(phase="training").analyze(model)
    assert not model.training
    assert all(torch.equal(t, before[name]) for name, t in model.tensors().items())


@pytest.mark.parametrize("wrong", [{"batch": 1}, {"batch": 9}, {"length": 1}, {"phase": "never"}])
def test_fields_are_held_to_their_limits(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        BatchIsolation.model_validate(wrong)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    monkeypatch.chdir(tmp_path)
    return Workplace(tmp_path)


def test_a_report_is_planned_made_kept_judged_and_told(
    place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    path = place.write(RECIPE)
    store = ["--store", str(place.store.folder)]
    assert main(["plan", str(path), "--json", *store]) == 0
    (planned,) = json.loads(capsys.readouterr().out)["reports"]
    assert (planned["name"], planned["method"], planned["inputs"]) == (
        "apart",
        "analyze.batch_isolation",
        ["small"],
    )
    assert planned["seconds"] > 0
    assert main(["plan", str(path), *store]) == 0
    assert "apart" in capsys.readouterr().out

    assert main(["compile", str(path), "--json", *store]) == 0
    record = json.loads(capsys.readouterr().out)
    (report,) = record["reports"]
    assert report["holds"]
    assert report["findings"] == []
    assert not report["cached"]
    assert [s["name"] for s in record["stages"]] == ["base", "small"]
    assert record["expects"][0]["holds"]
    assert Path("small.effc").is_dir()

    assert main(["compile", str(path), *store]) == 0
    said = capsys.readouterr()
    assert "says   apart (analyze.batch_isolation of small): no output row depends on another" in said.out
    assert "apart: taken from the store" in said.err
    page = (place.store.folder / "reports" / "apart.html").read_text()
    assert "What was analyzed" in page
    assert "no output row depends on another" in page

    assert main(["cache", "ls", *store]) == 0
    assert "analyze.batch_isolation" in capsys.readouterr().out
    assert main(["cache", "why-miss", str(path), *store]) == 0
    assert "apart: in the store under" in capsys.readouterr().out
    assert main(["cache", "gc", *store]) == 0


def test_findings_stop_exports(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    def leaky(self: BatchIsolation, model: object) -> Findings:
        return Findings.from_json(
            {
                "words": "an output row depends on another",
                "findings": [
                    {"where": "layers.0.mlp", "what": "amax takes rows together", "repair": "one a row"}
                ],
                "numbers": {},
            }
        )

    monkeypatch.setattr(BatchIsolation, "analyze", leaky)
    result = place.run(RECIPE)
    assert result.exit_code == 3
    assert [e.holds for e in result.expects] == [False]
    assert result.exports[0].refused == "`apart.findings <= 0` does not hold"
    assert not Path("small.effc").exists()
    assert result.as_json()["reports"][0]["findings"][0]["where"] == "layers.0.mlp"


def test_the_quickstart_s_artefact_is_proved_isolated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(__file__).parents[2]
    text = (root / "specs" / "recipes" / "quickstart.effc").read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.effc").write_text(text)
    assert main(["compile", "q.effc", "--tiny", "-p", "steps=2", "--store", "s"]) == 0, (
        capsys.readouterr().err
    )
    artefacts = sorted(tmp_path.glob("s/tiny/*.effc"))
    assert artefacts
    for artefact in artefacts:
        found = isolation(effc.load(str(artefact)))
        assert found.isolated, found.leaks
        assert len(found.phases) == 4


@pytest.mark.claim
def test_every_leak_is_found_and_nothing_else(measured: Measured) -> None:
    missed = sum(proof(f).isolated for f, _ in LEAKS.values())
    measured("analyze.batch_isolation", f"leaks missed, of {len(LEAKS)} kinds", missed, below=0.5)
    blamed = sum(not proof(f).isolated for f in KEEPS.values())
    measured(
        "analyze.batch_isolation", f"functions blamed without a leak, of {len(KEEPS)}", blamed, below=0.5
    )
    failed = sum(not isolation(fill(make())).isolated for make in FAMILIES.values())
    measured("analyze.batch_isolation", f"families not proved, of {len(FAMILIES)}", failed, below=0.5)
