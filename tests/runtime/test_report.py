"""The report page: what a reader finds at one look, and that it loads nothing."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from effc.runtime.report import page, view, write


def stage(
    name: str, method: str, inputs: list[str], size: int, loss: float, seconds: float
) -> dict[str, Any]:
    return {
        "name": name,
        "method": method,
        "inputs": inputs,
        "params": 1_000_000,
        "bytes": size,
        "flops_per_token": 2_000_000,
        "kv_bytes_per_token": 4096,
        "peak_bytes": 500_000_000 if inputs else 0,
        "seconds": seconds,
        "cached": False,
        "contract": {"fidelity": "LOSSY", "tolerance": None, "error": 0.05, "held": True} if inputs else {},
        "loss": {"code": loss},
        "latency": 0.002,
        "errors": {"layers.0.mlp.up": 0.02, "layers.1.mlp.up": 0.04, "head": 0.01} if name == "small" else {},
    }


@pytest.fixture
def record() -> dict[str, Any]:
    stages = [
        stage("base", "load", [], 16_000_000, 2.0, 0.4),
        stage("thin", "prune.depth", ["base"], 12_000_000, 2.6, 5.0),
        stage("heal", "distill.logits", ["thin", "base"], 12_000_000, 2.1, 80.0),
        stage("small", "quantize.gptq", ["heal"], 4_000_000, 2.15, 12.0),
    ]
    return {
        "recipe": "shrink",
        "title": "Smaller <at> nearly the same loss",
        "stages": stages,
        "expects": [
            {"text": "small.loss(code) <= base.loss(code) + 10%", "left": 2.15, "right": 2.2, "holds": True},
            {"text": "small.bytes <= 6 MB", "left": 4_000_000, "right": 6_000_000, "holds": True},
        ],
        "exports": [{"model": "small", "format": "artifact", "path": "out/small.effc", "verified": "loads"}],
        "plan": {"stages": copy.deepcopy(stages)},
    }


def test_says_what_shrank_what_it_cost_and_which_stage_cost_most(record: dict[str, Any]) -> None:
    seen = view(record)
    assert (seen["first"], seen["last"]) == ("base", "small")
    assert seen["tiles"][0]["change"] == "\N{MINUS SIGN}75%"
    assert seen["verdict"]["ok"]
    assert seen["verdict"]["detail"].startswith("2 expectations and 3 contracts")
    assert seen["sentences"] == [
        "Most bytes were saved by small (quantize.gptq): 8 MB.",
        "Most loss was cost by thin (prune.depth): +0.600 nats; heal (distill.logits) took back 0.500.",
        "Most time went into heal: 1 min 20 s, 82% of the run.",
    ]


def test_a_failed_expectation_is_the_first_thing_on_the_page(record: dict[str, Any]) -> None:
    record["expects"][0]["holds"] = False
    verdict = view(record)["verdict"]
    assert not verdict["ok"]
    assert verdict["words"] == "1 did not hold"
    assert verdict["broken"] == ["small.loss(code) <= base.loss(code) + 10%"]


def test_without_judgments_it_claims_nothing(record: dict[str, Any]) -> None:
    for expect in record["expects"]:
        expect["holds"] = None
    for each in record["stages"]:
        each["contract"] = {}
    verdict = view(record)["verdict"]
    assert not verdict["ok"]
    assert verdict["words"] == "Nothing was judged"


def test_plan_and_run_are_compared_with_the_stated_limits(record: dict[str, Any]) -> None:
    planned = record["plan"]["stages"]
    planned[1]["seconds"], planned[2]["peak_bytes"], planned[3]["bytes"] = 11.0, 700_000_000, 4_000_001
    rows = {row["stage"]: row for row in view(record)["predictions"]}
    assert rows["thin"]["seconds"]["ok"] is False
    assert rows["heal"]["peak"]["ok"] is False
    assert rows["small"]["bytes"]["ok"] is False
    assert rows["small"]["params"]["ok"] is True
    assert rows["small"]["peak"]["ok"] is True


def test_what_is_done_beside_the_stages_is_compared_too(record: dict[str, Any]) -> None:
    seconds = {"planned": 4.0, "measured": 9.0}
    record["predictions"] = [{"name": "expect: 2 judged", "cached": False, "seconds": seconds}]
    row = next(row for row in view(record)["predictions"] if row["stage"] == "expect: 2 judged")
    assert row["seconds"]["ok"] is False
    assert row["seconds"]["text"] == "4 s → 9 s"
    assert "expect: 2 judged" in page(record)


def test_the_page_loads_nothing_and_escapes_what_it_prints(record: dict[str, Any]) -> None:
    text = page(record)
    assert "Smaller &lt;at&gt;" in text
    assert "http" not in text.replace("Content-Security-Policy", "").replace("http-equiv", "")
    assert "<script" not in text
    assert "src=" not in text
    assert "prefers-color-scheme: dark" in text


def test_the_page_and_its_json_lie_side_by_side(record: dict[str, Any], tmp_path: Path) -> None:
    write(record, tmp_path / "out" / "report.html")
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == record
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!doctype html>")


def test_a_branching_recipe_measures_each_model_against_its_own_source(record: dict[str, Any]) -> None:
    record["stages"].append(stage("coarse", "quantize.rtn", ["base"], 5_000_000, 2.4, 1.0))
    rows = {row.name: row for row in view(record)["rows"]}
    assert rows["coarse"].source == "base"
    assert rows["coarse"].cells[0].change == "\N{MINUS SIGN}69%"


def test_warnings_stand_on_the_page_once_each(record: dict[str, Any]) -> None:
    assert "Warnings" not in page(record)
    left = "the export leaves 2 tensors behind"
    warning = {"code": "W553", "title": left, "notes": ["pooler.<weight>"], "help": "train a new head"}
    text = page(record | {"warnings": [warning, dict(warning)]})
    assert text.count(left) == 1
    assert "pooler.&lt;weight&gt;" in text
