"""Hash the weights that a recipe loads while torch is imported and the plan is made.

A run asks for the fingerprint of every file that it reads from. What is answered here was asked under the
path, size, time of change and inode of the file as it was before the hash was begun and is after it; a file
that changes between has no answer, and is hashed when it is needed. Imports no torch.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from blake3 import blake3

from effc.runtime.remembered import Remembered
from effc.specs.recipe import Recipe

BLOCK = 1 << 24
"""Bytes between two turns at Python's lock, which an import holds most of the time."""
LARGE = 1 << 24
"""Bytes from which a file is worth it."""

Question = list[str | int]
_found: dict[tuple[str | int, ...], str] = {}
_under_way: dict[tuple[str | int, ...], threading.Event] = {}


def question(path: Path) -> Question:
    """What a fingerprint of a file depends on: path, size, time of change, inode."""
    stat = os.stat(path)
    return ["blake3", str(path.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ino]


def begin(recipes: Sequence[Recipe], store: Path) -> None:
    """Start to hash, in a thread that nobody waits for, what is not remembered in the store."""
    remembered = Remembered(store.absolute() / "measured", store)
    asked: list[Path] = []
    for recipe in recipes:
        for binding in recipe.bindings:
            folder = binding.call.arguments.get("path")
            if binding.call.kind == "load" and isinstance(folder, str):
                asked += _weights(Path(folder))
    new = []
    for path in dict.fromkeys(asked):
        with suppress(OSError):
            about = question(path)
            if tuple(about) not in _found and remembered.known(about) is None:
                new.append((path, tuple(about)))
    if new:
        _under_way.update({about: threading.Event() for _, about in new})
        threading.Thread(target=_hash_all, args=(new,), daemon=True, name="effc-hash-ahead").start()


def answer(about: Question) -> str | None:
    """The hash under a question, waited for where it is under way; None when nobody took it."""
    if (coming := _under_way.get(tuple(about))) is not None:
        coming.wait()
    return _found.get(tuple(about))


def _weights(folder: Path) -> list[Path]:
    """Large safetensors files of a folder."""
    with suppress(OSError):
        return sorted(p for p in folder.glob("*.safetensors") if p.stat().st_size >= LARGE)
    return []


def _hash_all(files: Sequence[tuple[Path, tuple[str | int, ...]]]) -> None:
    for path, about in files:
        try:
            with suppress(OSError, MemoryError):
                digest = _hash(path)
                if tuple(question(path)) == about:
                    _found[about] = digest
        finally:
            _under_way.pop(about).set()


def _hash(path: Path) -> str:
    """By one thread: the other cores are at work on something else."""
    digest, buffer = blake3(), memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        while got := file.readinto(buffer):
            digest.update(buffer[:got])
    return digest.hexdigest()
