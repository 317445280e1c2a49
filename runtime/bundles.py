"""Bundles: all weights of a result in the files that its export will be, so that they are written once.

A bundle is kept under its BLAKE3 as an object is. An export that comes to write the same file gives it a
second name instead (a hard link), so store and export share its bytes, and either may be removed. Who edits
the export in place edits the bundle too: its time of change tells, and then its hash.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effc.compiler.checkpoint import TensorRef, read_header
from effc.compiler.checkpoint_write import write_folder
from effc.compiler.model import Model
from effc.compiler.weights import LazyTensor, Stored, resident
from effc.runtime import durable
from effc.runtime.fingerprints import hash_of, hashes_of
from effc.runtime.objects import Entry, damaged

Bundle = Mapping[str, Any]
"""{"files": {BLAKE3: [bytes, time of change in ns]}, "at": {tensor: [BLAKE3, offset]}} as plain JSON."""


class Bundles:
    """A folder of safetensors files named by their hashes."""

    def __init__(self, folder: Path, aside: Path) -> None:
        self.folder, self.aside = folder, aside
        self._verified: set[str] = set()

    def keep(self, model: Model, names: Mapping[str, str]) -> tuple[Bundle, dict[str, Entry]]:
        """Write all weights under the `names` of an export: name in the file -> tensor.

        Returns the bundle, and for each tensor what an object of it would be.

        Raises:
            EffcError: E601 when the disk is full, E602 when it cannot be written.
        """
        owned = {n: model.weights[n] if t.is_meta else resident(t) for n, t in model.tensors().items()}
        files: dict[str, list[int]] = {}
        at: dict[str, list[Any]] = {}
        entries: dict[str, Entry] = {}
        try:
            self.aside.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(dir=self.aside))
            try:
                write_folder(folder, {written: owned[name] for written, name in names.items()})
                for path in sorted(folder.glob("*.safetensors")):
                    refs = read_header(path)
                    file, own = hashes_of(path, refs)
                    stat = self._settled(path, file).stat()
                    files[file] = [stat.st_size, stat.st_mtime_ns]
                    at |= {names[written]: [file, ref.offset] for written, ref in refs.items()}
                    entries |= {names[written]: _entry(own[written], ref) for written, ref in refs.items()}
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        except OSError as problem:
            raise durable.refused(problem, self.folder) from problem
        return {"files": files, "at": at}, entries

    def whole(self, bundle: Bundle) -> bool:
        """Whether every file is there as it was written; one that was changed loses its name here."""
        return all(self._same(name, size, time) for name, (size, time) in bundle["files"].items())

    def lazy(self, bundle: Bundle, name: str, entry: Entry) -> LazyTensor:
        """A tensor that is read when needed. Reading raises EffcError E603 when the file was damaged."""
        file, offset = bundle["at"][name]
        _, _, dtype, shape = entry
        path = self.path(file)
        place = {"dtype": dtype, "shape": shape}

        def read() -> Tensor:
            self.verify(file)
            with path.open("rb") as opened:
                return durable.read_entry(opened, {**place, "data_offsets": [0, lazy.nbytes]}, offset)

        lazy = LazyTensor(tuple(shape), durable.NAMED[dtype], read, Stored(path, offset, linkable=True))
        return lazy

    def verify(self, name: str) -> None:
        """Compare a file with its name, once in the life of a process.

        Raises:
            EffcError: E603; the file is dropped, so that the next run makes it again.
        """
        if name not in self._verified:
            path = self.path(name)
            if hash_of(path) != name:
                path.unlink(missing_ok=True)
                raise damaged(path)
            self._verified.add(name)

    def path(self, name: str) -> Path:
        """Where the file of this hash lies or would lie."""
        return self.folder / f"{name}.safetensors"

    def sizes(self, bundle: Bundle | None) -> dict[Path, int]:
        """The files of a bundle with their bytes; empty where a result has none."""
        return {self.path(n): int(size) for n, (size, _) in (bundle or {"files": {}})["files"].items()}

    def _settled(self, path: Path, name: str) -> Path:
        """Give a written and synced file the name it keeps, its hash; one that is there already stays."""
        place = self.path(name)
        place.parent.mkdir(parents=True, exist_ok=True)
        if not (place.is_file() and hash_of(place) == name):
            os.replace(path, place)
            durable.sync_folder(place.parent)
        self._verified.add(name)
        return place

    def _same(self, name: str, size: int, time: int) -> bool:
        path = self.path(name)
        with suppress(OSError):
            found = path.stat()
            if (found.st_size, found.st_mtime_ns) == (size, time):
                return True
            if hash_of(path) == name:
                return True
            path.unlink()
        return False


def _entry(name: str, ref: TensorRef) -> Entry:
    """What a manifest says about a tensor that would be an object of this name."""
    like = torch.empty(ref.shape, dtype=ref.dtype, device="meta")
    return [name, durable.size_of(like), durable.DTYPES[ref.dtype], list(ref.shape)]
