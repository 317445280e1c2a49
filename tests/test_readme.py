"""The README is true: its tour runs as printed, and its table of methods is that of the code."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from effc.runtime import pages

README = Path(__file__).parents[1] / "README.md"
LOOSE = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
VARIES = re.compile(
    r"(\d+ (h|min) \d+ (min|s)|\d+(\.\d+)? (ms|s|min|h))(?!\w)"  # durations
    r"|\d+\.\d{3,}(e[+-]\d+)?|\d\.\de[+-]\d+"  # losses and errors
    r"|[+\u2212]\d+(\.\d+)? ?%|\d+(\.\d+)?%? (below|above)"  # their changes
    r"|of \d+(\.\d+)? GB"  # what the machine has
    r"|transformers \d\S*"
)
"""What differs from one machine to another; sizes and counts do not."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)


def commands() -> Iterator[tuple[str, str]]:
    """Every `$ command` of the tour with the output printed beneath it; `...` stands for any text."""
    for block in blocks("console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            yield command, output


def stable(text: str) -> str:
    return VARIES.sub("~", text)


def test_the_tour_runs_as_printed(tmp_path: Path) -> None:
    (recipe,) = blocks("effc")
    (tmp_path / "tour.effc").write_text(recipe)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cache = str(tmp_path / "cache")  # a machine of this user's may be calibrated
    environment = os.environ | {"PATH": path, "COLUMNS": "120", "XDG_CACHE_HOME": cache}

    def run(command: str) -> subprocess.CompletedProcess[str]:
        shell = ["bash", "-c", command]
        return subprocess.run(
            shell, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    run("effc methods")  # reads the methods once, and says so
    for command, expected in commands():
        done = run(command)
        printed = done.stdout if done.stdout.strip() else done.stderr
        same = doctest.OutputChecker().check_output(stable(expected), stable(printed), LOOSE)
        assert same, f"$ {command}\n{printed}\n{done.stderr}\n--- the README says ---\n{expected}"


def test_the_tour_has_commands() -> None:
    assert len(list(commands())) >= 5


def test_the_table_of_methods_is_current() -> None:
    assert pages.with_table(README.read_text()) == README.read_text(), "run `make docs`"
