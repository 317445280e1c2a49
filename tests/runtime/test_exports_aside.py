"""What a killed export leaves beside its target is removed by the next one; that of a running one stays."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from effc.runtime.cache import gc, gc_text
from effc.runtime.exports._aside import OLD, aside
from effc.runtime.store import Store

WRITER = """
import os, sys
from pathlib import Path
from effc.runtime.exports._aside import aside
with aside(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("written")
    if "moved" in sys.argv:  # between the two renames that replace a folder
        os.replace(sys.argv[1], folder / "old")
    print(folder, flush=True)
    sys.stdin.read()
"""


@contextmanager
def writer(target: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process in the middle of an export, and the folder it writes in; it ends with its input."""
    command = [sys.executable, "-c", WRITER, str(target), *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        if process.poll() is None:
            process.communicate()


def hidden(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def test_only_what_dead_exports_to_this_place_left_is_removed(tmp_path: Path) -> None:
    target, other = tmp_path / "small.effc", tmp_path / "small"
    mine = tmp_path / ".small.effc.backup"
    mine.mkdir()
    with ExitStack() as stack:
        killed, left = stack.enter_context(writer(target))
        elsewhere, stays = stack.enter_context(writer(other))
        running, used = stack.enter_context(writer(target))
        for process in (killed, elsewhere):
            process.kill()
            process.wait(10)
        assert (left / "half").read_text() == "written"
        with aside(target) as folder:
            assert not left.exists()
            assert hidden(tmp_path) == sorted(p.name for p in (mine, stays, used, folder))
        running.communicate()
        assert running.returncode == 0
    assert hidden(tmp_path) == sorted([mine.name, stays.name])


def test_the_folder_that_a_killed_export_had_moved_away_comes_back(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "effc.json").write_text("{}")
    with writer(target, "moved") as (process, left):
        process.kill()
        process.wait(10)
        assert not target.exists()
        assert (left / "old").is_dir()
    with aside(target):
        assert (target / "effc.json").read_text() == "{}"
    assert hidden(tmp_path) == []


def test_a_folder_that_could_not_be_replaced_stays(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()

    def fill() -> None:
        with aside(target) as folder:
            os.replace(target, folder / OLD)
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fill()
    assert target.is_dir()
    assert hidden(tmp_path) == []


def test_gc_removes_what_earlier_versions_left_where_exports_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    left, mine = Path("out/.small.effc.ab12cd34"), Path("out/.small.effc.my_notes")
    for folder, name in ((left, "small.effc"), (mine, "todo.txt")):
        (folder / name).mkdir(parents=True)
    reports = Path("store/reports")
    reports.mkdir(parents=True)
    (reports / "r.json").write_text('{"exports": [{"path": "out/small.effc"}]}')
    (reports / "broken.json").write_text("{")
    gone = gc(Store(Path("store")))
    assert gone["exports"] == 1
    assert "1 half-written exports" in gc_text(gone)
    assert hidden(Path("out")) == [mine.name]
