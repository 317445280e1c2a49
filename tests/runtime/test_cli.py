"""The command line: exit codes, usage errors, where errors go, and that quick commands stay quick."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from effc.runtime.cli import VERBS, main

from .workplace import RECIPE, Workplace


def test_no_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().err


def test_a_misspelt_command_names_the_one_that_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["complie", "x.effc"]) == 2
    assert "did you mean `compile`?" in capsys.readouterr().err


def test_a_misspelt_option_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "x.effc", "--tinny"]) == 2
    assert "--tinny" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("effc ")


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    said = capsys.readouterr().out
    assert VERBS[verb].summary[:40] in said.replace("\n", " ")
    assert "--json" in said


def test_a_problem_goes_to_stderr_and_exits_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--target", str(tmp_path / "none.yaml")]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error[E680]")


def test_with_json_a_problem_is_json_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "zoo:pylm", "--json"]) == 1
    said = capsys.readouterr()
    (problem,) = json.loads(said.out)["diagnostics"]
    assert problem["code"] == "E680"
    assert said.err == ""


def test_an_interrupt_exits_130_and_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("effc.runtime.cli_result.bench", stopped)
    assert main(["bench", "x"]) == 130
    assert "goes on" in capsys.readouterr().err


def test_the_entry_loads_neither_torch_nor_pydantic() -> None:
    code = "import sys; from effc.runtime.cli import main; main(['--version']); print(sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'torch'" not in out
    assert "'pydantic'" not in out


def test_a_run_whose_expect_fails_is_told_to_its_end_and_exits_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    place = Workplace(tmp_path)
    gate = "expect heal.bytes < 1 kB\nexpect small.bytes < base.bytes"
    place.write(
        RECIPE.replace("expect small.bytes < base.bytes", gate) + 'export small as artifact("small.effc")\n'
    )
    assert main(["compile", "t.effc", "--store", "store"]) == 3
    said = capsys.readouterr()
    assert "heal.bytes < 1 kB" in said.out
    assert "E605" in said.err
    assert (tmp_path / "store" / "reports" / "t.html").is_file()
    assert not (tmp_path / "small.effc").exists(), "what it exports was never made"
