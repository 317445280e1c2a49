"""Files that are there whole or not at all: written aside, synced, renamed; the folder synced too.

Every function may be stopped at any instruction, by a crash or a full disk, and leaves either the old file
or the new one. What is left aside lies in a folder that the store empties.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from effc.specs.diagnostic import Diagnostic, EffcError

ENTRY = "tensor"
"""Name of the one tensor in a file that holds one."""

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
NAMED = {name: dtype for dtype, name in DTYPES.items()}
_BLOCK = 1 << 24


def publish(path: Path, write: Callable[[BinaryIO], None], aside: Path) -> None:
    """Write a file by `write` in the folder `aside`, then move it to `path`, on the same file system.

    Raises:
        EffcError: E601 when the disk is full, E602 when the place cannot be written.
    """
    temporary: str | None = None
    try:
        aside.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=aside)
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as problem:
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)
        raise refused(problem, path) from problem


def publish_json(path: Path, data: Any, aside: Path) -> None:
    """As `publish`, for plain data."""
    text = json.dumps(data, indent=1, allow_nan=True).encode()
    publish(path, lambda file: write(file, text), aside)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last; systems that cannot sync a folder do not need it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as problem:
        if problem.errno not in (errno.EINVAL, errno.EBADF):
            raise
    finally:
        os.close(handle)


def refused(problem: OSError, path: Path) -> EffcError:
    """A disk that is full or a place that cannot be written, in words."""
    full = problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    note = f"the system says: {problem.strerror or problem}"
    if full:
        advice = "free some space or choose another place, then run the same command: it goes on from here"
        return EffcError(Diagnostic("E601", f"there is no room to write `{path}`", (), (note,), advice))
    advice = "choose a place that can be written, with `--store DIR` or the path of the export"
    return EffcError(Diagnostic("E602", f"`{path}` cannot be written", (), (note,), advice))


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor], data: Any = None) -> None:
    """A safetensors file of tensors in the order given; `data` is kept as JSON in its metadata."""
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write(file, head_of(held, data))
    for tensor in held.values():
        write(file, bytes_of(tensor))


def head_of(tensors: Mapping[str, Tensor], data: Any = None) -> bytes:
    """Length and table of a safetensors file, padded to 8 bytes."""
    table: dict[str, Any] = {}
    if data is not None:
        table["__metadata__"] = {"json": json.dumps(data)}
    offset = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        spot = [offset, offset + size]
        table[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": spot}
        offset += size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def size_of(tensor: Tensor) -> int:
    """Bytes of a file that holds this tensor alone."""
    return len(head_of({ENTRY: tensor})) + tensor.numel() * tensor.element_size()


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """What `write_tensors` wrote.

    Raises:
        ValueError: when the file is not whole.
    """
    with path.open("rb") as file:
        table, begin = read_head(file)
        metadata = table.pop("__metadata__", {})
        file.seek(0, os.SEEK_END)
        if file.tell() != begin + max((e["data_offsets"][1] for e in table.values()), default=0):
            raise ValueError(f"{path} is not whole")
        tensors = {name: read_entry(file, entry, begin) for name, entry in table.items()}
    return tensors, json.loads(metadata["json"]) if "json" in metadata else None


def read_head(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The table of a safetensors file of our own, and where its tensors begin."""
    size = int.from_bytes(file.read(8), "little")
    if not 2 <= size <= 1 << 27:
        raise ValueError("the table is too large or too small")
    table = json.loads(file.read(size))
    if not isinstance(table, dict):
        raise ValueError("the table is no mapping")
    return table, 8 + size


def read_entry(file: BinaryIO, entry: Mapping[str, Any], begin: int) -> Tensor:
    """One tensor of a file, read into memory of its own."""
    dtype, shape = NAMED[entry["dtype"]], tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    if start == stop:
        return torch.empty(shape, dtype=dtype)
    content = bytearray(stop - start)
    file.seek(begin + start)
    if file.readinto(content) != stop - start:  # type: ignore[attr-defined]
        raise ValueError("a tensor is cut short")
    return torch.frombuffer(content, dtype=dtype).reshape(shape)


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in main memory, not copied."""
    if not tensor.numel():
        return memoryview(b"")
    content: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(content)


def write(file: BinaryIO, content: bytes | memoryview) -> None:
    """Write all of it, in blocks, so that a signal is seen between them."""
    view = memoryview(content)
    for start in range(0, len(view), _BLOCK):
        file.write(view[start : start + _BLOCK])
