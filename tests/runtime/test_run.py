"""Whole recipes: what runs again, what an `expect` stops, how a stopped run goes on."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from effc.runtime import closure, gates, training_state
from effc.runtime.artifact import story
from effc.runtime.cache import gc, ls, ls_text, why_miss, why_text
from effc.runtime.front import parse
from effc.runtime.progress import Event
from effc.runtime.stopping import Stopping
from effc.runtime.verify import verify
from effc.specs.diagnostic import EffcError

from .workplace import RECIPE, Workplace


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    monkeypatch.chdir(tmp_path)
    return Workplace(tmp_path)


def test_a_recipe_runs_once_and_is_then_taken_from_the_store(work: Workplace) -> None:
    first = work.run()
    assert work.names("cached") == []
    assert [s.name for s in first.stages] == ["base", "thin", "heal", "small", "side"]
    assert [e.holds for e in first.expects] == [True]
    assert first.exit_code == 0
    second = work.run()
    assert work.names("cached") == ["thin", "heal", "small", "side"]
    assert [s.fingerprint for s in second.stages] == [s.fingerprint for s in first.stages]


def test_the_record_has_the_keys_that_a_plan_has_and_what_was_measured(work: Workplace) -> None:
    record = work.run().as_json()
    json.dumps(record, allow_nan=False)
    stage = next(s for s in record["stages"] if s["name"] == "small")
    due = {
        "name",
        "method",
        "inputs",
        "params",
        "bytes",
        "flops_per_token",
        "kv_bytes_per_token",
        "peak_bytes",
    }
    assert due | {"seconds", "cached", "contract"} <= stage.keys()
    assert stage["inputs"] == ["heal"]
    assert stage["bytes"] < record["stages"][0]["bytes"]
    assert stage["peak_bytes"] > 10**8
    assert stage["seconds"] > 0
    assert stage["contract"]["held"] is True
    assert stage["contract"]["error"] > 0
    assert 1 < stage["loss"]["code"] < 8
    assert set(stage["errors"]) >= {"layers.0.mlp.up", "layers.1.attention.q"}


def test_a_changed_parameter_runs_its_stage_and_what_depends_on_it_alone(work: Workplace) -> None:
    work.run()
    work.run(RECIPE, "steps=6")
    assert work.names("start") == ["heal", "small"]
    assert work.names("cached") == ["thin", "side"]


def test_a_stage_that_comes_out_equal_leaves_what_follows_valid(work: Workplace) -> None:
    work.run()
    work.run(RECIPE, "keep=50%")
    assert work.names("start") == ["thin"], "the key differs, the same two layers stay"
    assert work.names("cached") == ["heal", "small", "side"]


def test_an_edited_method_runs_again_and_only_it(
    work: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work.run()
    real = closure.source
    own = real("effc.passes.quantize.rtn")
    assert own is not None
    copy = tmp_path / "rtn.py"
    monkeypatch.setattr(closure, "source", lambda m: copy if m == "effc.passes.quantize.rtn" else real(m))
    copy.write_text(own.read_text() + "\n# a remark\n")
    work.run()
    assert work.names("start") == [], "a comment changes nothing"
    copy.write_text(own.read_text() + "\nREVISION = 2\n")
    work.run()
    assert work.names("start") == ["side"]


def test_why_miss_names_the_part_that_differs(work: Workplace) -> None:
    work.run()
    recipe = parse(work.write(), ["steps=9"])
    rows = {row["stage"]: row for row in why_miss(recipe, work.store)}
    assert (rows["thin"]["hit"], rows["side"]["hit"]) == (True, True)
    assert rows["heal"]["differs"] == [{"part": "arguments.steps", "now": 9, "then": 5}]
    assert rows["small"]["because"] == "heal"
    text = why_text(list(rows.values()))
    assert "arguments.steps: now 9, then 5" in text
    assert "not known before `heal` has run" in text
    with pytest.raises(EffcError) as caught:
        why_miss(recipe, work.store, stage="heel")
    assert caught.value.diagnostics[0].code == "E205"


def test_ls_lists_results_and_gc_waits_for_no_one(work: Workplace) -> None:
    assert ls_text(ls(work.store)) == "the store is empty"
    work.run()
    rows = ls(work.store)
    assert {row["stage"] for row in rows} == {"thin", "heal", "small", "side"}
    assert all(row["bytes"] > 1000 for row in rows)
    with work.store.open(), pytest.raises(EffcError) as caught:
        gc(work.store)
    assert caught.value.diagnostics[0].code == "E606"
    assert gc(work.store)["results"] == 0
    work.run()
    assert work.names("start") == []


# ---- expects and exports


class Format:
    """An export that writes one line."""

    published: list[str] = []  # noqa: RUF012

    def __init__(self, call: Any) -> None:
        self.path = call.arguments["path"]

    def publish(self, model: Any, *rest: Any) -> SimpleNamespace:
        Format.published.append(self.path)
        return SimpleNamespace(consumer="a reader", error=0.0)


@pytest.fixture
def formats(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(gates, "spec_of", lambda role, call: Format(call))
    Format.published = []
    return Format.published


GATED = RECIPE.replace("expect small.bytes < base.bytes", "{expect}\nexport small as gguf(\"small.gguf\")\n"
                       "export side as gguf(\"side.gguf\")")  # fmt: skip


def test_a_failed_expect_cancels_what_depends_on_its_model_and_no_more(
    work: Workplace, formats: list[str]
) -> None:
    made = work.run(GATED.replace("{expect}", "expect heal.bytes < 1 kB\nexpect small.bytes < 1 MB"))
    assert made.exit_code == 3
    assert [s.name for s in made.stages] == ["base", "thin", "heal", "side"]
    assert [e.holds for e in made.expects] == [False, None]
    assert formats == ["side.gguf"]
    assert "heal.bytes < 1 kB" in made.exports[0].refused
    (problem,) = made.problems
    assert problem.code == "E605"
    assert "^^^^" in problem.render()
    again = work.run(GATED.replace("{expect}", "expect heal.bytes < 1 MB"))
    assert work.names("start")[0] == "small", "what was made before the failure is still there"
    assert again.exit_code == 0
    assert formats == ["side.gguf", "small.gguf", "side.gguf"]


def test_an_export_waits_for_every_expect_about_its_ancestors(work: Workplace, formats: list[str]) -> None:
    work.run(GATED.replace("{expect}", "expect side.bytes < thin.bytes\nexpect small.bytes < heal.bytes"))
    told = [(e.what, e.name or e.text.split(":")[0]) for e in work.events if e.what in ("expect", "export")]
    assert told == [
        ("expect", "small.bytes < heal.bytes"),
        ("export", "gguf of small"),
        ("expect", "side.bytes < thin.bytes"),
        ("export", "gguf of side"),
    ]


def test_tiny_judges_nothing_and_writes_below_the_store(work: Workplace, formats: list[str]) -> None:
    made = work.run(GATED.replace("{expect}", "expect small.bytes < 1 kB"), tiny=True)
    assert made.exit_code == 0
    assert [e.holds for e in made.expects] == [None]
    assert "random" in made.expects[0].words
    assert formats == [str(work.store.folder / "tiny" / name) for name in ("small.gguf", "side.gguf")]


def test_an_output_that_cannot_be_written_is_said_at_the_export(work: Workplace, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file where a folder is due")
    text = RECIPE + 'export small as artifact("out/small.effc")\n'
    with pytest.raises(EffcError) as caught:
        work.run(text)
    (problem,) = caught.value.diagnostics
    assert problem.code == "E602"
    assert "export small as artifact" in problem.render()
    (tmp_path / "out").unlink()
    work.run(text)
    assert work.names("start") == ["artifact of small", "side"], "what was made before stays made"
    told = story(tmp_path / "out" / "small.effc")
    assert told.recipe == text
    assert {s["name"]: s["method"] for s in told.lock["stages"]}["heal"] == "distill.logits"
    assert {edit[0] for edit in told.edits} == {"thin", "heal", "small"}


def test_errors_point_at_the_binding(work: Workplace) -> None:
    with pytest.raises(EffcError) as caught:
        work.run(RECIPE.replace("text/*.txt", "nowhere/*.txt"))
    rendered = caught.value.diagnostics[0].render()
    assert "E620" in rendered
    assert "nowhere" in rendered
    assert "^^^" in rendered


# ---- stopping


@pytest.mark.parametrize("moment", ["heal", "small"])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    work: Workplace, tmp_path: Path, moment: str
) -> None:
    whole = work.run(RECIPE, "steps=12")
    work.store.folder.rename(tmp_path / "uninterrupted")

    def interrupt(event: Event) -> None:
        if (event.what, event.name, event.done) == ("progress", moment, 1):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        work.run(RECIPE, "steps=12", watch=interrupt)
    assert moment not in work.names("done")
    again = work.run(RECIPE, "steps=12")
    assert work.names("resumed") == [moment]
    assert [s.fingerprint for s in again.stages] == [s.fingerprint for s in whole.stages]


def test_every_checkpoint_of_a_training_leads_to_the_same_end(
    work: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = work.run(RECIPE, "steps=6")
    monkeypatch.setattr(training_state, "_EVERY", 0.0)
    monkeypatch.setattr(training_state, "_SHARE", 1e9)

    class Killed(BaseException):
        pass

    for step in (2, 4):
        work.store.folder.rename(tmp_path / f"before-{step}")

        def kill(event: Event, step: int = step) -> None:
            if (event.what, event.name, event.done) == ("progress", "heal", step):
                raise Killed

        with pytest.raises(Killed):
            work.run(RECIPE, "steps=6", watch=kill)
        again = work.run(RECIPE, "steps=6")
        assert work.names("resumed") == ["heal"]
        progress = [e.done for e in work.events if e.what == "progress" and e.name == "heal"]
        assert progress[0] == step, "the step told last before the end was not yet saved"
        assert again.stage("small").fingerprint == whole.stage("small").fingerprint


def test_a_unit_that_does_not_end_is_cut_short_within_two_seconds() -> None:
    def endless() -> None:
        with Stopping() as stop:
            signal.raise_signal(signal.SIGTERM)
            assert stop()
            while time.perf_counter() - start < 5:
                pass

    before = signal.getsignal(signal.SIGINT)
    start, work = time.perf_counter(), time.process_time()
    with pytest.raises(KeyboardInterrupt):
        endless()
    assert time.perf_counter() - start > 0.5, "it gets some time to end by itself"
    assert time.process_time() - work < 2, "of work, so that others on the machine do not count"
    assert signal.getsignal(signal.SIGINT) is before


def test_an_artefact_of_a_recipe_in_two_files_is_checked_without_them(work: Workplace) -> None:
    lines = RECIPE.splitlines(keepends=True)
    shared = [line for line in lines if line.startswith(("model", "data"))]
    (work.folder / "common.effc").write_text("".join(["effc 1\n", *shared]))
    text = 'effc 1\nrecipe t\nuse "common.effc" as c\nside = quantize.rtn(c.base, bits = 8, group = 32)\n'
    work.run(text + 'expect side.loss(c.code) < 9\nexport side as artifact("out/side.effc")\n')
    (work.folder / "common.effc").unlink()
    record = verify(work.folder / "out" / "side.effc", deep=True)
    assert {c["what"]: c["holds"] for c in record["checks"]}["loss(c.code)"] is True
