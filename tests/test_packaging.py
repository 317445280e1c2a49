"""The package list in pyproject.toml names every folder, and only folders, that hold modules or data."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_folder_is_packaged() -> None:
    floors = {name: ROOT / folder for name, folder in SETUP["package-dir"].items() if "." in name}
    found = {"effc"}
    for name, folder in floors.items():
        for sub in [folder, *(d for d in folder.rglob("*") if d.is_dir() and d.name != "__pycache__")]:
            found.add(".".join([name, *sub.relative_to(folder).parts]))
    assert sorted(SETUP["packages"]) == sorted(found)


def test_links_match_the_map() -> None:
    for name, folder in SETUP["package-dir"].items():
        if name != "effc":
            link = ROOT / "src" / name.replace(".", "/")
            if link.is_file():
                pytest.skip("this checkout has no symbolic links; only type checkers miss them")
            assert link.resolve() == ROOT / folder, f"run: ln -s ../../{folder} {link}"


def test_packages_with_code_have_a_first_line() -> None:
    for folder in SETUP["package-dir"].values():
        for init in (ROOT / folder).rglob("__init__.py"):
            assert init.read_text().startswith('"""'), f"{init} does not say what the folder holds"
