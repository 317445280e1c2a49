"""Journal: the finished units of a running stage on disk. A unit is there whole or not at all.

A unit is one safetensors file, its plain data in the file's metadata; nothing else is ever read back.
Saving a unit of a name again replaces it, so a training that saves under one name keeps its last state alone.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from effc.runtime.durable import publish, read_tensors, write_tensors

_NAME = re.compile(r"^[a-z0-9][a-z0-9._-]{0,80}$")


class FolderJournal:
    """A journal in a folder of its own; the folder is made when the first unit is saved."""

    def __init__(self, folder: Path, saved: Callable[[str], None] = lambda unit: None) -> None:
        """`saved` is told the name of every unit once it is on disk."""
        self.folder = folder
        self._saved = saved

    def units(self) -> list[str]:
        """Names of the finished units, sorted."""
        return sorted(path.stem for path in self._units.glob("*.safetensors"))

    def done(self, unit: str) -> bool:
        """Whether the unit can be read back; one that was damaged on disk counts as never made."""
        path = self._path(unit)
        if not path.is_file():
            return False
        try:
            read_tensors(path)
        except (OSError, ValueError, KeyError, TypeError):
            path.unlink(missing_ok=True)
            return False
        return True

    def save(self, unit: str, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
        """Keep a unit.

        Raises:
            EffcError: E601 when the disk is full, E602 when it cannot be written.
        """
        whole = dict(data)
        publish(self._path(unit), lambda file: write_tensors(file, tensors, whole), self.folder / "aside")
        self._saved(unit)

    def read(self, unit: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What was saved. Raises FileNotFoundError when there is no such unit."""
        tensors, data = read_tensors(self._path(unit))
        return tensors, data

    def spill(self) -> Path:
        """A folder for what a stage writes besides; it lives as long as the journal."""
        path = self.folder / "spill"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def drop(self) -> None:
        """Forget everything; the stage is published or given up."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _units(self) -> Path:
        return self.folder / "units"

    def _path(self, unit: str) -> Path:
        if not _NAME.match(unit):
            raise ValueError(f"{unit!r} is no name of a unit")
        return self._units / f"{unit}.safetensors"
