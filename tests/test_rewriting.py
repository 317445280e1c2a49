"""docs/rewriting.md is true: its examples run as printed, and its package works from a folder of its own."""

from __future__ import annotations

import doctest
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from effc.specs import user_cache

PAGE = Path(__file__).parents[1] / "docs" / "rewriting.md"
LOOSE = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL
FENCE = re.compile(
    r"(?:^`(?P<file>[^`\n]+)`:\n\n)?^```(?P<language>\w+)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)


def blocks() -> Iterator[tuple[str, str, str]]:
    """(file, language, text) of every block; the file is empty where none is named."""
    for found in FENCE.finditer(PAGE.read_text()):
        yield found["file"] or "", found["language"], found["body"]


def test_the_examples_run_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(optionflags=LOOSE, verbose=False)
    ran = 0
    for file, language, text in blocks():
        if file:
            break
        if language == "python":
            exec(compile(text, str(PAGE), "exec"), names)
        elif language == "pycon":
            example = parser.get_doctest(text, names, "rewriting", str(PAGE), 0)
            shown: list[str] = []
            runner.run(example, out=shown.append, clear_globs=False)
            assert not shown, "".join(shown)
            names = example.globs
            ran += len(example.examples)
    assert ran >= 15


def test_the_errors_read_as_printed() -> None:
    import effc

    text = PAGE.read_text()
    with pytest.raises(effc.EffcError) as caught:
        effc.pattern("norm -> linear[in<]")
    assert str(caught.value) in text
    model = effc.trace(torch.nn.Sequential(torch.nn.LayerNorm(2), torch.nn.Linear(2, 2)), torch.ones(1, 2))
    with pytest.raises(effc.EffcError) as caught:
        list(effc.Rewriter(model).match(effc.pattern("norm[usres=1]")))
    assert str(caught.value) in text


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The page's package in a folder, with the dist-info that pip would write."""
    site = tmp_path / "site"
    for file, _, text in blocks():
        if file:
            place = tmp_path / file if file.endswith(".effc") else site / file
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)
    info = site / "acme_effc-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-effc\nVersion: 1.0\n")
    points = re.search(
        r"^\[project\.entry-points\.\"effc\.methods\"\]\n(.*?)$", (site / "pyproject.toml").read_text(), re.M
    )
    assert points is not None
    (info / "entry_points.txt").write_text("[effc.methods]\n" + points[1].replace('"', "") + "\n")
    return site


def test_the_package_works_from_check_to_artifact(package: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    if user_cache.folder().is_dir():
        shutil.copytree(user_cache.folder(), cache / "effc", ignore=shutil.ignore_patterns("*.so"))
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {
        "PATH": search,
        "PYTHONPATH": str(package),
        "XDG_CACHE_HOME": str(cache),
        "COLUMNS": "120",
    }

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    run("effc", "methods")  # reads the new method once, and says so
    console = next(text for _, language, text in blocks() if language == "console")
    for part in re.split(r"^\$ ", console, flags=re.MULTILINE)[1:]:
        command, _, expected = part.partition("\n")
        done = run(*command.split())
        printed = done.stdout if done.stdout.strip() else done.stderr
        same = doctest.OutputChecker().check_output(expected, printed, LOOSE)
        assert done.returncode == 0, f"$ {command}\n{printed}\n{done.stderr}"
        assert same, f"$ {command}\n{printed}\n{done.stderr}\n--- the page says ---\n{expected}"
    plan = run("effc", "plan", "folded.effc")
    assert plan.returncode == 0, plan.stderr
    assert "fold.gain" in plan.stdout
    tested = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(package / "tests"))
    assert tested.returncode == 0, tested.stdout + tested.stderr
