"""One writer at a time: a lock on a file that the system gives back when its holder ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from effc.runtime.durable import refused


@contextmanager
def locked(path: Path, waiting: Callable[[str], None], stop: Callable[[], bool]) -> Iterator[bool]:
    """Hold the lock at `path`; gives whether it had to wait for another process.

    `waiting` is told once who holds it. The file stays: removing it would let two processes lock two files.

    Raises:
        KeyboardInterrupt: when `stop` says so while waiting.
        EffcError: E602 when the place cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as problem:
        raise refused(problem, path) from problem
    try:
        waited = False
        while not _try(handle):
            if not waited:
                holder = os.pread(handle, 32, 0).decode("ascii", "replace").strip()
                waiting(holder or "another process")
            waited = True
            if stop():
                raise KeyboardInterrupt
            time.sleep(0.05)
        with suppress(OSError):  # a full disk must not keep a lock from being held
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()}\n".encode(), 0)
        yield waited
    finally:
        os.close(handle)


def free(path: Path) -> bool:
    """Whether nobody holds the lock now."""
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:
        return True
    try:
        return _try(handle)
    finally:
        os.close(handle)


def _try(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def shared(path: Path, alone: bool) -> Iterator[bool]:
    """Use something together with other processes, or `alone`: then false when somebody uses it now.

    Raises:
        EffcError: E602 when the place cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as problem:
        raise refused(problem, path) from problem
    try:
        if alone:
            yield _try(handle)
        else:
            fcntl.flock(handle, fcntl.LOCK_SH)
            yield True
    finally:
        os.close(handle)
