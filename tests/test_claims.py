"""The table of claims shows every claim, failures as failures, and only a run of all claims writes it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CLAIMS = """
import pytest
from tests.claims import Measured

pytestmark = pytest.mark.claim


@pytest.mark.parametrize("seed", [0, 1])
def test_better(seed: int, measured: Measured) -> None:
    measured("prune.wanda", "loses less", 0.25 + seed, below=1.0)
    measured("prune.wanda", "is never reached by seed 1", 2.0, above=1.0)


def test_a_sentence_without_numbers() -> None:
    pass


def test_that_breaks() -> None:
    raise RuntimeError("no such luck")


@pytest.mark.skip(reason="not here")
def test_of_another_machine() -> None:
    pass
"""
ROOT = Path(__file__).parents[1]
CONFTEST = """
from pathlib import Path
from tests import claims
from tests.claims import measured
claims.FOLDER = Path(__file__).parent / "docs"

def pytest_addoption(parser):
    parser.addoption("--write-claims", action="store_true")

def pytest_configure(config):
    if config.getoption("--write-claims"):
        config.pluginmanager.register(claims.Table(claims.FOLDER, claims.whole(config)))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "checks").mkdir()
    (tmp_path / "checks" / "test_some_method.py").write_text(CLAIMS)
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = claim\n")
    return tmp_path


def claims(project: Path, *words: str) -> str:
    """The table that a run leaves, empty if none."""
    environment = {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    line = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(project), "-p", "no:cacheprovider", *words]
    subprocess.run(line, cwd=project, env=environment, capture_output=True, check=False)
    table = project / "docs" / "claims.md"
    return table.read_text() if table.exists() else ""


def test_all_claims_have_a_row_and_failures_are_shown(project: Path) -> None:
    text = claims(project, "-m", "claim", "--write-claims")
    assert "| prune.wanda | loses less | 0.25 < 1; 1.25 < 1 | **fails** in 1 of 2 |" in text
    assert "| prune.wanda | is never reached by seed 1 | 2 > 1 | holds |" in text
    assert "| some method | a sentence without numbers |  | holds |" in text
    assert "| some method | that breaks | RuntimeError: no such luck | **fails** in 1 of 1 |" in text
    assert "| some method | of another machine | Skipped: not here | skipped |" in text
    assert "5 claims, 2 of them fail" in text
    rows = json.loads((project / "docs" / "claims.json").read_text())
    assert [row["verdict"] for row in rows] == ["holds", "holds", "fails", "holds", "fails", "skipped"]


def test_nothing_is_written_unasked(project: Path) -> None:
    assert claims(project, "-m", "claim") == ""


def test_one_file_again_replaces_its_rows_alone_and_a_whole_run_drops_what_is_gone(project: Path) -> None:
    (project / "checks" / "test_other.py").write_text(CLAIMS.replace("no such luck", "still none"))
    claims(project, "-m", "claim", "--write-claims")
    (project / "checks" / "test_some_method.py").write_text(CLAIMS.replace("no such luck", "less luck"))
    text = claims(project, "-m", "claim", "--write-claims", "checks/test_some_method.py")
    assert "| some method | that breaks | RuntimeError: less luck | **fails** in 1 of 1 |" in text
    assert "| other | that breaks | RuntimeError: still none | **fails** in 1 of 1 |" in text
    (project / "checks" / "test_other.py").unlink()
    text = claims(project, "-m", "claim", "--write-claims")
    assert "| other |" not in text
    assert "| some method | that breaks | RuntimeError: less luck | **fails** in 1 of 1 |" in text
