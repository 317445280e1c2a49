"""JSON from files that nobody vouches for: bounded size, no duplicate keys, no NaN, errors in words.

Also the one way to a file of a model folder: by plain name, a regular file, inside the folder.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from effc.specs.diagnostic import Diagnostic, EffcError

LIMIT = 16 << 20
"""Bytes that a JSON file of a model may have unless its reader says otherwise."""


def inside(folder: Path, name: str, root: Path | None = None) -> Path:
    """The file `name` of a folder, links followed, which must end inside `root` (the folder itself if None).

    A Hugging Face cache keeps its files as links into a neighbouring folder, so there `root` is the folder above.

    Raises:
        EffcError: E433 when the name is no plain file name or leads outside, E441 when there is no such
            regular file.
    """
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name or len(name) > 255:
        _refuse("E433", f"{name[:80]!r} is no plain file name", folder)
    path = folder / name
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError) as problem:
        what = "is missing" if not path.is_symlink() else "is a link that leads nowhere"
        raise EffcError(
            Diagnostic("E441", f"`{name}` {what}", notes=(f"looked in {folder}",))
        ) from problem
    if not real.is_relative_to((root or folder).resolve()):
        _refuse("E433", f"`{name}` is a link that leads out of its folder", folder)
    if not stat.S_ISREG(mode):
        _refuse("E441", f"`{name}` is not a regular file", folder)
    return real


def has(folder: Path, name: str) -> bool:
    """Is there anything of this name in the folder, a broken link included?"""
    return os.path.lexists(folder / name)


def read_bytes(folder: Path, name: str, root: Path | None = None, limit: int = LIMIT) -> bytes:
    """The content of a file, read whole.

    Raises:
        EffcError: as `inside`; E440 when the file is larger than `limit`, E690 when it cannot be read.
    """
    path = inside(folder, name, root)
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as problem:
        raise EffcError(Diagnostic("E690", f"`{name}` cannot be read: {problem.strerror}")) from problem
    if len(content) > limit:
        size = path.stat().st_size
        raise EffcError(
            Diagnostic(
                "E440",
                f"`{name}` is larger than a file of its kind can be",
                notes=(f"{size} bytes, the limit is {limit}", f"in {folder}"),
            )
        )
    return content


def parse(content: bytes, what: str) -> Any:
    """The value that JSON text holds.

    Raises:
        EffcError: E440 for malformed JSON, a key given twice, NaN, an endless number, or deep nesting.
    """
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_constant)
    except RecursionError:
        reason = "it is nested too deeply"
    except (ValueError, UnicodeDecodeError) as problem:
        reason = str(problem)[:200]
    raise EffcError(Diagnostic("E440", f"`{what}` is not JSON that can be trusted", notes=(reason,)))


def read(folder: Path, name: str, root: Path | None = None, limit: int = LIMIT) -> dict[str, Any]:
    """The JSON object in a file of a model folder.

    Raises:
        EffcError: as `read_bytes` and `parse`; E440 when the file holds something else than an object.
    """
    value = parse(read_bytes(folder, name, root, limit), name)
    if not isinstance(value, dict):
        raise EffcError(Diagnostic("E440", f"`{name}` holds {type(value).__name__}, not an object"))
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} is given twice")
    return made


def _constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON number")


def _refuse(code: str, title: str, folder: Path) -> NoReturn:
    raise EffcError(Diagnostic(code, title, notes=(f"in {folder}",)))
