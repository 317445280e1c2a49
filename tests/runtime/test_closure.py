"""The import closure: complete, and blind to layout, comments and what only type checkers see."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from effc.runtime import closure

FILES = {
    "__init__.py": '"""A floor."""\n',
    "first.py": "from effc.floor import second\nfrom effc.floor.inner import third\nimport os\n",
    "second.py": '"""Says."""\nfrom typing import TYPE_CHECKING\n\n'
    "if TYPE_CHECKING:\n    from effc.floor import unseen\nX = 1\n",
    "unseen.py": "Y = 2\n",
    "inner/__init__.py": "",
    "inner/third.py": "def late():\n    from . import fourth\n    return fourth\n",
    "inner/fourth.py": "Z = 3\n",
}


@pytest.fixture
def floor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(closure, "_floor", {"floor": tmp_path}.get)
    return tmp_path


def test_closure_follows_imports_late_ones_and_packages_but_not_those_for_types(floor: Path) -> None:
    assert closure.closure(["effc.floor.first"]) == [
        "effc.floor",
        "effc.floor.first",
        "effc.floor.inner",
        "effc.floor.inner.fourth",
        "effc.floor.inner.third",
        "effc.floor.second",
    ]


def test_fingerprint_changes_with_code_anywhere_below_and_not_with_layout(floor: Path) -> None:
    before = closure.fingerprint(["effc.floor.first"])
    (floor / "inner/fourth.py").write_text("# a comment\nZ   =   3\n")
    (floor / "unseen.py").write_text("Y = 7\n")
    assert closure.fingerprint(["effc.floor.first"]) == before
    (floor / "inner/fourth.py").write_text("Z = 30\n")
    assert closure.fingerprint(["effc.floor.first"]) != before


def test_docstrings_count_only_where_they_are_read(floor: Path) -> None:
    with_words, without = (closure.fingerprint(["effc.floor.first"], d) for d in (True, False))
    (floor / "second.py").write_text(FILES["second.py"].replace("Says.", "Says it in other words."))
    assert closure.fingerprint(["effc.floor.first"], True) != with_words
    assert closure.fingerprint(["effc.floor.first"], False) == without


def test_a_module_without_source_is_an_error(floor: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"effc\.floor\.nowhere"):
        closure.closure(["effc.floor.nowhere"])


def test_reading_a_method_imports_neither_it_nor_torch() -> None:
    code = (
        "import sys; from effc.runtime.closure import closure; "
        "found = closure(['effc.passes.quantize.rtn']); assert 'effc.compiler.rewrite' in found, found; "
        "assert 'torch' not in sys.modules and 'effc.passes.quantize.rtn' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
