"""The files that a result is streamed into: one a tensor, as the store keeps them, or those of its export.

A file has its full size and its header from the start, so that pieces can be written in any order and a stage
that was killed can go on in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from effc.compiler.checkpoint import NAMES
from effc.compiler.checkpoint_write import SHARD, Layout, nbytes, shards
from effc.compiler.weights import LazyTensor, Stored


def laid_out(
    folder: Path, layout: Layout, names: Mapping[str, str] | None
) -> tuple[dict[str, Stored], set[Path]]:
    """Prepare the files of a result in a folder.

    Args:
        folder: exists; files of an earlier try may be in it.
        layout: tensor -> shape and dtype.
        names: name in the file -> tensor, where the files are to be those of an export.

    Returns where each tensor goes, in the order of the files, and the files that are new or were damaged.
    """
    homes: dict[str, Stored] = {}
    fresh: set[Path] = set()
    if names is None:
        for number, (name, entry) in enumerate(layout.items()):
            path = folder / f"{number:05d}.safetensors"
            offsets = _prepare(path, {"tensor": entry}, {}, fresh)
            homes[name] = Stored(path, offsets["tensor"])
        return homes, fresh
    for number, part in enumerate(shards({written: layout[name] for written, name in names.items()}, SHARD)):
        path = folder / f"result-{number:05d}.safetensors"
        offsets = _prepare(path, part, {"__metadata__": {"format": "pt"}}, fresh)
        homes |= {names[written]: Stored(path, offset, linkable=True) for written, offset in offsets.items()}
    return homes, fresh


def lazy(home: Stored, shape: tuple[int, ...], dtype: torch.dtype) -> LazyTensor:
    """The tensor that lies there."""
    size = int(np.prod(shape, dtype=np.int64))

    def read() -> Tensor:
        with home.file.open("rb") as file:
            file.seek(home.offset)
            content = bytearray(file.read(size * dtype.itemsize))
        return (
            torch.frombuffer(content, dtype=dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
        )

    return LazyTensor(shape, dtype, read, home)


def sync(files: Iterable[Path]) -> None:
    """Wait until what was written to the files is on disk."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _prepare(path: Path, layout: Layout, more: Mapping[str, object], fresh: set[Path]) -> dict[str, int]:
    """Make the file unless it is there; the byte at which each tensor begins."""
    head, offsets, size = _head(layout, more)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if os.fstat(descriptor).st_size != size or os.pread(descriptor, len(head), 0) != head:
            fresh.add(path)
            os.ftruncate(descriptor, 0)
            os.ftruncate(descriptor, size)
            os.pwrite(descriptor, head, 0)
    finally:
        os.close(descriptor)
    return offsets


def _head(layout: Layout, more: Mapping[str, object]) -> tuple[bytes, dict[str, int], int]:
    """The header of a safetensors file, where each tensor begins, and where the file ends."""
    table, at = dict(more), 0
    starts: dict[str, int] = {}
    for name, (shape, dtype) in layout.items():
        size = nbytes(shape, dtype)
        table[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        starts[name] = at
        at += size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {n: begin + s for n, s in starts.items()}, begin + at
