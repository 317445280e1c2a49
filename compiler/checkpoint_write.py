"""Write safetensors as a stream: the header from shapes, then tensor after tensor, synced, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from effc.compiler.checkpoint import NAMES, refuse
from effc.compiler.weights import LazyTensor

SHARD = 5 * 10**9
"""Bytes of weights in one file; larger models are split, as other tools expect."""

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Tensor name -> shape and dtype, in the order of the file."""


def nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    count = dtype.itemsize
    for n in shape:
        count *= n
    return count


class SafetensorsWriter:
    """One file: `with SafetensorsWriter(path, layout) as file: file.put(name, tensor)`, in any order.

    The file appears under its name when the block ends without an error and every tensor was put; until then
    it lies aside as `.NAME.part`.
    """

    def __init__(self, path: Path, layout: Layout, metadata: Mapping[str, str] | None = None) -> None:
        self.path = path
        self._aside = path.with_name(f".{path.name}.part")
        header: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
        self._places: dict[str, tuple[int, tuple[int, ...], torch.dtype]] = {}
        at = 0
        for name, (shape, dtype) in layout.items():
            size = nbytes(shape, dtype)
            entry = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
            header[name] = entry
            self._places[name] = (at, shape, dtype)
            at += size
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        self._head = len(raw).to_bytes(8, "little") + raw
        self.size = len(self._head) + at
        self._due = set(self._places)

    def __enter__(self) -> Self:
        self._file = self._aside.open("wb", buffering=0)
        self._file.write(self._head)
        os.ftruncate(self._file.fileno(), self.size)
        return self

    def link(self, file: Path, offsets: Mapping[str, int]) -> bool:
        """Give the file that is to be written, if `file` is that file, its name, and write nothing.

        `offsets` say where `file` holds each tensor. Nothing is done where file systems cannot link.
        """
        with suppress(OSError), file.open("rb") as opened:
            same = os.fstat(opened.fileno()).st_size == self.size
            same = same and opened.read(len(self._head)) == self._head
            if same and all(offsets[n] == len(self._head) + at for n, (at, _, _) in self._places.items()):
                os.link(file, self.path)
                return True
        return False

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor at its place. Raises ValueError when shape or dtype are not those of the layout."""
        at, shape, dtype = self._places[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(f"{name} is {list(tensor.shape)} {tensor.dtype}, not {list(shape)} {dtype}")
        flat = tensor.detach().cpu().contiguous().view(-1)
        content: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
        view = memoryview(content)
        at += len(self._head)
        while view:
            done = os.pwrite(self._file.fileno(), view, at)
            view, at = view[done:], at + done
        self._due.discard(name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self._due:
                    raise ValueError(f"{len(self._due)} tensors were not written, {min(self._due)} first")
                os.fsync(self._file.fileno())
        except BaseException:
            kind = ValueError
            raise
        finally:
            self._file.close()
            if kind is None:
                os.replace(self._aside, self.path)
            else:
                self._aside.unlink(missing_ok=True)


def shards(layout: Layout, limit: int) -> list[dict[str, tuple[tuple[int, ...], torch.dtype]]]:
    """Cut a layout into files of at most `limit` bytes each, in order; a larger tensor has its own."""
    found: list[dict[str, tuple[tuple[int, ...], torch.dtype]]] = [{}]
    used = 0
    for name, (shape, dtype) in layout.items():
        size = nbytes(shape, dtype)
        if found[-1] and used + size > limit:
            found.append({})
            used = 0
        found[-1][name] = (shape, dtype)
        used += size
    return found


def check_free(folder: Path, needed: int) -> None:
    """Refuse before writing when the disk has no room. Raises EffcError E419."""
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    if free < needed:
        refuse("E419", folder, f"{needed} bytes are due, and the disk has {free} free", "free some disk")


def write_file(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Write tensors to one file, one in memory at a time; where the store holds that file, link it."""
    writer = SafetensorsWriter(path, {name: (t.shape, t.dtype) for name, t in tensors.items()})
    if _linked(writer, tensors):
        return
    with writer as file:
        for name, tensor in tensors.items():
            file.put(name, tensor.read())


def _linked(writer: SafetensorsWriter, tensors: Mapping[str, LazyTensor]) -> bool:
    stored = {name: t.stored for name, t in tensors.items() if t.stored is not None and t.stored.linkable}
    files = {place.file for place in stored.values()}
    if len(files) != 1 or len(stored) != len(tensors):
        return False
    smallest = min(tensors.values(), key=lambda t: t.nbytes)
    smallest.read()  # compares the whole file with the hash that is its name
    return writer.link(files.pop(), {name: place.offset for name, place in stored.items()})


def write_folder(folder: Path, tensors: Mapping[str, LazyTensor], limit: int = SHARD) -> list[str]:
    """Write tensors, one in memory at a time, as model.safetensors, or as shards and an index beyond `limit`.

    Returns the names of the files.
    """
    parts = shards({name: (t.shape, t.dtype) for name, t in tensors.items()}, limit)
    count = len(parts)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    names = ["model.safetensors"] if count == 1 else names
    for name, part in zip(names, parts, strict=True):
        write_file(folder / name, {tensor: tensors[tensor] for tensor in part})
    if count == 1:
        return names
    table = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": table}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*names, path.name]
