"""From an empty directory only `effc` is importable: no floor leaks under its bare name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def importable(name: str, cwd: Path) -> bool:
    code = f"import importlib.util as u, sys; sys.exit(u.find_spec({name!r}) is None)"
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, check=False).returncode == 0


@pytest.mark.parametrize("floor", ["specs", "dsl", "compiler", "kernels", "passes", "runtime"])
def test_floors_do_not_leak(floor: str, tmp_path: Path) -> None:
    assert not importable(floor, tmp_path)


def test_effc_is_importable(tmp_path: Path) -> None:
    assert importable("effc.specs", tmp_path)
