"""JSON lines: one object a line, with errors that name the line and the fields that are there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from effc.runtime.data import _files
from effc.specs.diagnostic import Diagnostic, EffcError


def rows(pattern: str) -> tuple[list[Path], Iterator[tuple[str, dict[str, Any]]]]:
    """The files, and every object in them with its place `file:line`.

    Raises: E620, E622 for the files; E623 for a line that is not a JSON object.
    """
    files = _files.find(pattern)
    return files, _rows(files)


def _rows(files: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in files:
        for number, line in enumerate(_files.read(path).split("\n"), 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as problem:
                raise malformed(where, "is not JSON", str(problem)) from problem
            if not isinstance(value, dict):
                raise malformed(where, "is not a JSON object", f"it is of type {type(value).__name__}")
            yield where, value


def take(where: str, row: dict[str, Any], field: str) -> Any:
    """The value of a field.

    Raises: E623 when the object lacks it.
    """
    if field not in row:
        raise malformed(where, f"has no field `{field}`", f"it has: {', '.join(map(str, row)) or 'none'}")
    return row[field]


def malformed(where: str, what: str, note: str) -> EffcError:
    """An object that does not hold what the source needs."""
    help = "every line is one object; write which field holds the text with `field = ...`"
    return EffcError(Diagnostic("E623", f"`{where}` {what}", notes=(note,), help=help))
