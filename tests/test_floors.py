"""Imports go down only: specs < dsl < compiler < kernels < passes < runtime, read from the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ["specs", "dsl", "compiler", "kernels", "passes", "runtime"]


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every absolute import of a file, deferred ones too, as (module, line)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.lineno


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_go_down(floor: str) -> None:
    above = {f"effc.{name}" for name in FLOORS[FLOORS.index(floor) + 1 :]}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in (ROOT / floor).rglob("*.py")
        for module, line in imports(path)
        if ".".join(module.split(".")[:2]) in above
    ]
    assert not wrong


@pytest.mark.parametrize("floor", ["specs", "dsl"])
def test_language_floors_never_name_torch(floor: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in (ROOT / floor).rglob("*.py")
        for module, line in imports(path)
        if module.split(".")[0] == "torch"
    ]
    assert not wrong
