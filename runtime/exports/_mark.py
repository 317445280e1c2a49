"""The mark in an exported folder: which format effc wrote, and size and BLAKE3 of every file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from effc.compiler.checkpoint import parse_json, within
from effc.runtime.fingerprints import hash_of
from effc.specs.diagnostic import Diagnostic, EffcError

MARK = "effc.json"
"""File in every exported folder; only folders with it are ever replaced."""
_LARGEST = 4 << 20


def put(folder: Path, kind: str, listed: bool) -> None:
    """Write the mark; `listed`: with its files, for folders that have no list of their own."""
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if listed else []
    table = {str(path.relative_to(folder)): [path.stat().st_size, hash_of(path)] for path in files}
    told = {"export": kind, "effc": version("effc")} | ({"files": table} if listed else {})
    (folder / MARK).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def get(folder: Path) -> Mapping[str, Any]:
    """The mark of a folder.

    Raises:
        EffcError: E444 when it is no table, E414 when it cannot be read.
    """
    path = folder / MARK
    with path.open("rb") as file:
        found = parse_json(file.read(_LARGEST), path)
    if not isinstance(found, Mapping) or not isinstance(found.get("files", {}), Mapping):
        raise EffcError(Diagnostic("E444", f"`{path}` is not the mark of an export"))
    return found


def changed(folder: Path, mark: Mapping[str, Any]) -> list[str]:
    """Names of the files that differ from the mark.

    Raises:
        EffcError: E416 when a name leads out of the folder.
    """
    found = []
    for name, entry in mark.get("files", {}).items():
        path = within(folder, name)
        if not path.is_file() or [path.stat().st_size, hash_of(path)] != entry:
            found.append(name)
    return found
