"""Safetensors written as a stream: shapes first, then the tensors one after another, synced, renamed at the end.

Peak memory is one tensor. A file appears under its name only when it is whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from effc.compiler.checkpoint import INDEX, SINGLE, SPELLED
from effc.compiler.weights import LazyTensor

SHARD = 5 * 10**9
"""Bytes of tensors in one file; larger models are split, as other tools expect."""
_PIECE = 1 << 24


class SafetensorsWriter:
    """Writes one file. `shapes`: name -> (shape, dtype), in the order in which the tensors will come.

        with SafetensorsWriter(path, shapes) as writer:
            for name in shapes: writer.add(name, tensor)
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        self.path = path
        self.aside = path.with_name(f".{path.name}.part")
        self.due = list(shapes.items())[::-1]
        table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (shape, dtype) in shapes.items():
            size = _size(shape, dtype)
            table[name] = {
                "dtype": SPELLED[dtype],
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.head = len(text).to_bytes(8, "little") + text

    def __enter__(self) -> Self:
        self.file = self.aside.open("wb")
        self.file.write(self.head)
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor.

        Raises:
            ValueError: another tensor, shape or dtype is due.
        """
        due, (shape, dtype) = self.due.pop()
        if name != due or tuple(tensor.shape) != shape or tensor.dtype != dtype:
            given = f"{name} {list(tensor.shape)} {tensor.dtype}"
            raise ValueError(f"{due} {list(shape)} {dtype} is due, not {given}")
        if tensor.numel():
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            view = memoryview(flat.numpy())
            for start in range(0, len(view), _PIECE):
                self.file.write(view[start : start + _PIECE])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self.due:
                    raise ValueError(f"{self.due[-1][0]} was not written")
                self.file.flush()
                os.fsync(self.file.fileno())
        finally:
            self.file.close()
            if kind is not None or self.due:
                with suppress(OSError):
                    self.aside.unlink()
        if kind is None:
            os.replace(self.aside, self.path)


def write_folder(folder: Path, tensors: Mapping[str, LazyTensor], shard: int = SHARD) -> list[str]:
    """Write tensors as model.safetensors, or as shards with an index where they take more than `shard` bytes.

    Returns the names of the files written.
    """
    parts = list(_parts(tensors, shard))
    names = [SINGLE] if len(parts) == 1 else []
    if not names:
        names = [f"model-{n:05d}-of-{len(parts):05d}.safetensors" for n in range(1, len(parts) + 1)]
    for name, part in zip(names, parts, strict=True):
        shapes = {key: (tensors[key].shape, tensors[key].dtype) for key in part}
        with SafetensorsWriter(folder / name, shapes) as writer:
            for key in part:
                writer.add(key, tensors[key].read())
    if len(parts) == 1:
        return names
    total = sum(t.nbytes for t in tensors.values())
    where = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    with (folder / INDEX).open("w", encoding="utf-8") as file:
        json.dump(index, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    return [*names, INDEX]


def _parts(tensors: Mapping[str, LazyTensor], shard: int) -> Iterator[list[str]]:
    """Names in order, a new part whenever the next tensor would exceed the limit."""
    part: list[str] = []
    filled = 0
    for name, tensor in tensors.items():
        if part and filled + tensor.nbytes > shard:
            yield part
            part, filled = [], 0
        part.append(name)
        filled += tensor.nbytes
    yield part


def _size(shape: Iterable[int], dtype: torch.dtype) -> int:
    size = dtype.itemsize
    for n in shape:
        size *= n
    return size
