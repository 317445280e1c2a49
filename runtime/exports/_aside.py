"""The hidden folder beside a target in which an export is written, and what becomes of those left behind.

Its maker locks the folder itself; the system gives the lock back however the process ends. A folder of our
name that nobody locks was left by one that was killed, and the next export to the same target removes it.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

OLD = "old"
"""Name in it of the folder that the target was before; put back when the new one never got its place."""


@contextmanager
def aside(target: Path) -> Iterator[Path]:
    """A new folder on the file system of `target`, whose parent exists; removed behind the block.

    Raises:
        OSError: when the place cannot be written.
    """
    sweep(target)
    folder, handle = _made(target)
    try:
        yield folder
    finally:
        _clear(folder, target)
        os.close(handle)


def sweep(target: Path, older: bool = False) -> int:
    """Remove what killed exports to `target` left beside it; those of running ones stay. Returns how many.

    `older`: also folders as the first versions named them, `.NAME.` and eight characters, if they hold
    nothing but what such a version puts there.
    """
    ours = re.compile(re.escape(_prefix(target)) + r"[a-z0-9_]{8}")
    former = re.compile(re.escape(f".{target.name}.") + r"[a-z0-9_]{8}")
    count = 0
    with suppress(OSError), os.scandir(target.parent) as entries:
        hidden = [Path(e) for e in entries if e.is_dir(follow_symlinks=False)]
        for folder in hidden:
            known = former.fullmatch(folder.name) and {p.name for p in folder.iterdir()} <= {target.name, OLD}
            if ours.fullmatch(folder.name) or (older and known):
                with suppress(OSError):  # somebody else's, gone by now, or on a disk without locks: leave it
                    _remove(folder, target)
                    count += 1
    return count


def _remove(folder: Path, target: Path) -> None:
    """Remove a folder unless its maker runs; raises OSError then."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _clear(folder, target)
    finally:
        os.close(handle)


def _clear(folder: Path, target: Path) -> None:
    """Remove a folder of ours, but first give back what the target was, if nothing stands there now."""
    if not target.exists():
        with suppress(OSError):  # nothing was there before either
            os.rename(folder / OLD, target)
    shutil.rmtree(folder, ignore_errors=True)


def _made(target: Path) -> tuple[Path, int]:
    """A locked folder and the handle that holds its lock; again when a sweep took it before it was locked."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
        with suppress(FileNotFoundError):
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            with suppress(OSError):  # a file system without locks never sweeps either
                fcntl.flock(handle, fcntl.LOCK_EX)
            if folder.is_dir():
                return folder, handle
            os.close(handle)


def _prefix(target: Path) -> str:
    return f".{target.name}.effc-"
