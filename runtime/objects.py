"""Objects: tensors and files by content, each written once and compared with its name when it is read.

A tensor is a safetensors file with one entry, so that any tool can look at it; its name is the BLAKE3
of the file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from blake3 import blake3
from torch import Tensor

from effc.compiler.model import Model
from effc.compiler.weights import LazyTensor, Stored
from effc.runtime import durable
from effc.runtime.fingerprints import hash_of
from effc.specs.diagnostic import Diagnostic, EffcError

Entry = list[Any]
"""[name, bytes on disk] of a file; [name, bytes on disk, dtype, shape] of a tensor."""


class Objects:
    """A folder of objects in 256 folders by the first two digits of their names."""

    def __init__(self, folder: Path, aside: Path, works: Path) -> None:
        """`works` is where stages write files that may be taken over."""
        self.folder, self.aside, self.works = folder, aside, works
        self._verified: set[str] = set()

    # -- writing

    def keep(self, model: Model, name: str) -> Entry:
        """Make sure that a tensor is an object; its (id, bytes on disk, dtype, shape)."""
        tensor = model.tensors()[name]
        if not tensor.is_meta:
            return self.keep_tensor(tensor)
        if name not in model.weights:
            raise EffcError(Diagnostic("E410", f"there are no weights for `{name}`"))
        lazy = model.weights[name]
        if lazy.stored is not None:
            file = lazy.stored.file
            if file.parent.parent == self.folder:
                return [file.name, file.stat().st_size, durable.DTYPES[lazy.dtype], list(lazy.shape)]
            if self.works in file.parents and (kept := self._adopt(file, lazy)):
                return kept
        return self.keep_tensor(lazy.read())

    def keep_lazy(self, lazy: LazyTensor) -> Entry:
        """The same for a tensor that no module holds."""
        if lazy.stored is not None and (file := lazy.stored.file).parent.parent == self.folder:
            return [file.name, file.stat().st_size, durable.DTYPES[lazy.dtype], list(lazy.shape)]
        return self.keep_tensor(lazy.read())

    def keep_tensor(self, tensor: Tensor) -> Entry:
        """Write a tensor as an object unless it is one already."""
        held = tensor.detach().cpu().contiguous()
        name, size, *_ = entry = entry_of(held)
        if not self.whole(name, size):
            tensors = {durable.ENTRY: held}
            durable.publish(self.path(name), lambda file: durable.write_tensors(file, tensors), self.aside)
        self._verified.add(name)
        return entry

    def _adopt(self, file: Path, lazy: LazyTensor) -> Entry | None:
        """Take over a file that a stage wrote as an object would be; None when it looks otherwise."""
        with file.open("rb") as opened:
            table, begin = durable.read_head(opened)
        if set(table) != {durable.ENTRY} or lazy.stored is None or lazy.stored.offset != begin:
            return None
        name, size = hash_of(file), file.stat().st_size
        place = self.path(name)
        if not self.whole(name, size):
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
                place.unlink(missing_ok=True)
                os.link(file, place)  # the journal keeps its own name until the result is published
                durable.sync_folder(place.parent)
            except OSError:
                return None
        return [name, size, durable.DTYPES[lazy.dtype], list(lazy.shape)]

    def keep_file(self, content: bytes) -> Entry:
        """Write a small file as an object unless it is one already."""
        name = blake3(content).hexdigest()
        if not self.whole(name, len(content)):
            durable.publish(self.path(name), lambda file: durable.write(file, content), self.aside)
        self._verified.add(name)
        return [name, len(content)]

    # -- reading

    def lazy(self, entry: Entry) -> LazyTensor:
        """A tensor that is read when needed. Reading raises: as `verify`."""
        name, size, dtype, shape = entry
        count = durable.NAMED[dtype].itemsize
        for n in shape:
            count *= n
        path = self.path(name)

        def read() -> Tensor:
            self.verify(name)
            with path.open("rb") as file:
                table, begin = durable.read_head(file)
                return durable.read_entry(file, table[durable.ENTRY], begin)

        return LazyTensor(tuple(shape), durable.NAMED[dtype], read, Stored(path, size - count))

    def file(self, name: str) -> bytes:
        """The content of a file. Raises: as `verify`."""
        self.verify(name)
        return self.path(name).read_bytes()

    def verify(self, name: str) -> None:
        """Compare an object with its name, once in the life of a process.

        Raises:
            EffcError: E603; the object is dropped, so that the next run makes it again.
        """
        if name in self._verified:
            return
        path = self.path(name)
        if hash_of(path) != name:
            path.unlink(missing_ok=True)
            raise damaged(path)
        self._verified.add(name)

    def whole(self, name: str, size: int) -> bool:
        """Whether the object is there in its full size."""
        try:
            return self.path(name).stat().st_size == size
        except OSError:
            return False

    def path(self, name: str) -> Path:
        """Where the object lies or would lie."""
        return self.folder / name[:2] / name


def identity_of(tensor: Tensor) -> str:
    """The name that a tensor has as an object."""
    held = tensor.detach().cpu().contiguous()
    digest = blake3(durable.head_of({durable.ENTRY: held}))
    digest.update(durable.bytes_of(held))
    return digest.hexdigest()


def entry_of(tensor: Tensor) -> Entry:
    """What a manifest says about a tensor that is an object."""
    return [identity_of(tensor), durable.size_of(tensor), durable.DTYPES[tensor.dtype], list(tensor.shape)]


def damaged(path: Path) -> EffcError:
    """A file of the store that was changed, and has been dropped."""
    note = "its content does not have the hash that is its name; it was dropped"
    advice = "run the same command again: it makes what is missing"
    return EffcError(Diagnostic("E603", f"`{path}` is damaged", (), (note,), advice))
