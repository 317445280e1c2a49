"""Every shipped recipe is in canonical form and compiles on tiny models as planned; what it makes loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import effc
from effc.runtime.cli import main

RECIPES = sorted((Path(__file__).parents[1] / "specs" / "recipes").glob("*.effc"))
STEPPED = {"fold", "four-bit", "shift", "sparse"}
"""Recipes that train nothing, so that their steps cannot be cut short."""


def test_each_kind_of_stage_and_export_has_a_recipe() -> None:
    words = " ".join(path.read_text() for path in RECIPES)
    from effc.runtime.catalogue import catalogue

    entries = catalogue().entries
    methods = {e.kind for e in entries if e.role == "method" and e.family != "lower"}
    exports = {e.kind for e in entries if e.role == "export"}
    # What is left belongs to a neighbor: magnitude to wanda, task arithmetic to ties.
    assert {kind for kind in methods if f"{kind}(" not in words} <= {
        "prune.magnitude",
        "merge.task_arithmetic",
        "reparam.branch",  # of convolutions, which no model that recipes load has
        "reparam.fold_bn",
        "reparam.weight_std",
        "reparam.batchformer",
        "arch.batch_channel_norm",
        "linearize.vig",  # of images
        "arch.layer_norm",  # of batch and layer norms, which no model that recipes load has
    }
    assert {kind for kind in exports if f" {kind}(" not in words} == set()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_is_in_canonical_form(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fmt", str(path), "--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_compiles_as_planned(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(path.parents[2])
    short = [] if path.stem in STEPPED else ["-p", "steps=2"]
    store = tmp_path / "store"
    code = main(["compile", str(path), "--tiny", "--json", "--store", str(store), *short])
    said = capsys.readouterr()
    assert code == 0, said.out + said.err
    record = json.loads(said.out)
    events = [json.loads(line)["event"] for line in said.err.splitlines() if line.startswith("{")]
    assert "done" in events
    assert "export" in events

    planned = {stage["name"]: stage for stage in record["plan"]["stages"]}
    assert [stage["name"] for stage in record["stages"]] == list(planned)
    for stage in record["stages"]:
        guess = planned[stage["name"]]
        if guess["contract"].get("size") == "at most":  # it follows from data
            assert (stage["params"], stage["bytes"]) <= (guess["params"], guess["bytes"]), stage["name"]
        else:
            assert (stage["params"], stage["bytes"]) == (guess["params"], guess["bytes"]), stage["name"]
        assert stage["contract"].get("held") is not False, stage["name"]
        # The plan's own record and the run's say the same things under the same names.
        assert set(guess) <= set(stage), set(guess) - set(stage)

    assert record["exports"]
    for export in record["exports"]:
        assert export["verified"], export
        assert not export["refused"], export
        _generates(Path(export["path"]), export["format"])


def _generates(place: Path, format_: str) -> None:
    if format_ in ("artifact", "hf"):
        model = effc.load(str(place))
        ids = torch.randint(0, 40, (1, 5), generator=torch.Generator().manual_seed(0))
        assert model.generate(ids, max_new_tokens=3).shape == (1, 8)
    else:
        assert place.exists()
