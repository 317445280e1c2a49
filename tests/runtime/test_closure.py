"""The import closure: complete, and blind to layout, comments and what only type checkers see."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from effc.runtime import closure
from effc.runtime.read_sources import ReadSources

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


@pytest.fixture
def settled(floor: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A floor whose files were changed long ago, and a cache that holds nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(floor / "cache"))
    for path in floor.rglob("*.py"):
        os.utime(path, (1000, 1000))
    return floor


def anew(monkeypatch: pytest.MonkeyPatch, *parsed: Path) -> str:
    """The fingerprint as a new process takes it; fails where it parses other files than these."""
    for cached in (closure._read, closure._tree, closure._digest, closure._names):
        cached.cache_clear()
    seen: list[str] = []
    real = closure.ast.parse
    monkeypatch.setattr(closure.ast, "parse", lambda text, filename="": seen.append(filename) or real(text))
    found = closure.fingerprint(["effc.floor.first"])
    monkeypatch.setattr(closure.ast, "parse", real)
    assert {*seen} == {str(path) for path in parsed}
    return found


def test_a_later_process_parses_only_what_was_changed(settled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = [p for p in settled.rglob("*.py") if p.name != "unseen.py"]
    before = anew(monkeypatch, *running)
    assert anew(monkeypatch) == before
    (settled / "second.py").write_text("X = 5\n")
    os.utime(settled / "second.py", (2000, 2000))
    after = anew(monkeypatch, settled / "second.py")
    assert after != before
    assert anew(monkeypatch) == after


def test_a_name_that_becomes_a_module_is_followed_though_nothing_is_parsed(
    settled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (settled / "second.py").write_text("from effc.floor.inner import later\n")
    os.utime(settled / "second.py", (1000, 1000))
    anew(monkeypatch, *(p for p in settled.rglob("*.py") if p.name != "unseen.py"))
    (settled / "inner/later.py").write_text("Z = 4\n")
    anew(monkeypatch, settled / "inner/later.py")
    assert "effc.floor.inner.later" in closure.closure(["effc.floor.first"])


def test_nothing_is_remembered_of_a_file_that_was_just_changed(
    settled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (settled / "second.py").write_text("X = 5\n")
    anew(monkeypatch, *(p for p in settled.rglob("*.py") if p.name != "unseen.py"))
    anew(monkeypatch, settled / "second.py")


def test_another_reader_finds_nothing(settled: Path) -> None:
    stamp = ("somewhere.py", 1, 2)
    one = ReadSources(("reader.py", 1, 1))
    one.put(stamp, "whole", "abc")
    assert one.get(stamp, "whole") == "abc"
    one.put(closure._stamp(settled / "first.py"), "whole", "def")
    one.keep()
    again, other = ReadSources(("reader.py", 1, 1)), ReadSources(("reader.py", 2, 1))
    assert again.get(closure._stamp(settled / "first.py"), "whole") == "def"
    assert other.get(closure._stamp(settled / "first.py"), "whole") is None
    assert again.get(stamp, "whole") is None, "a file that is gone is not kept"
