"""Codes of diagnostics: those that the sources use are those that are registered, each with one sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import effc
from effc.runtime.cli import main
from effc.specs.codes import CODES

ROOT = Path(effc.__file__).resolve().parents[2]
FLOORS = ("specs", "dsl", "compiler", "kernels", "passes", "runtime")


def used() -> dict[str, str]:
    """Code -> a file that uses it; the list itself does not count."""
    files = [p for floor in FLOORS for p in sorted((ROOT / floor).rglob("*.py")) if p.name != "codes.py"]
    return {
        code: str(p.relative_to(ROOT)) for p in files for code in re.findall(r'"([EW]\d{3})"', p.read_text())
    }


def test_every_code_is_registered() -> None:
    assert {code: file for code, file in used().items() if code not in CODES} == {}


def test_no_code_is_registered_in_vain() -> None:
    assert sorted(set(CODES) - set(used())) == []


def test_codes_are_named_nowhere_that_do_not_exist() -> None:
    """Docstrings and comments speak of codes too."""
    said = {
        code
        for floor in FLOORS
        for p in (ROOT / floor).rglob("*.py")
        for code in re.findall(r"\b[EW]\d{3}\b", p.read_text())
    }
    assert sorted(said - set(CODES)) == []


@pytest.mark.parametrize("code", CODES)
def test_a_code_has_one_sentence_and_explain_prints_it(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.fullmatch(r"[A-Z`][^.]+(?:\.[a-z]+[^.]*)*\.", CODES[code])
    assert main(["explain", code.lower()]) == 0
    assert capsys.readouterr().out == f"{code}: {CODES[code]}\n"


def test_explain_knows_what_is_near(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "E299"]) == 1
    assert "near it: E2" in capsys.readouterr().err
