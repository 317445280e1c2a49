"""Read safetensors files without trusting them: a header is checked before anything is allocated.

A file is eight bytes of header length n (little-endian), n bytes of JSON, then the tensors' bytes. Reading is
by pread into fresh memory, never by mmap, which would count as resident.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from effc.compiler.weights import LazyTensor, Stored
from effc.specs.diagnostic import Diagnostic, EffcError

MAX_HEADER = 16 << 20
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 8
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of dtypes, as far as a weight may have them."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}

_SHARD = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors$")


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where a tensor lies: `nbytes` bytes from byte `offset` of `file`."""

    file: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self, rows: tuple[int, int] | None = None) -> Tensor:
        """The tensor, or rows [start, stop) of its first dimension.

        Raises:
            EffcError: E415 when the file ends early.
        """
        start, nbytes, shape = self.offset, self.nbytes, self.shape
        if rows is not None and shape:
            stride = self.nbytes // max(shape[0], 1)
            start, nbytes = start + rows[0] * stride, (rows[1] - rows[0]) * stride
            shape = (rows[1] - rows[0], *shape[1:])
        raw = torch.empty(nbytes, dtype=torch.uint8)
        content: Any = raw.numpy()
        view = memoryview(content)
        with self.file.open("rb", buffering=0) as file:
            while view:
                got = os.preadv(file.fileno(), [view], start)
                if got == 0:
                    refuse("E415", self.file, f"the file ends {len(view)} bytes before its tensors do")
                view, start = view[got:], start + got
        return raw.view(self.dtype).view(shape) if nbytes else torch.empty(shape, dtype=self.dtype)

    def lazy(self) -> LazyTensor:
        """The same, as a model's weight source holds it."""
        return LazyTensor(self.shape, self.dtype, self.read, Stored(self.file, self.offset))


def refuse(code: str, path: Path, why: str, help: str | None = None) -> NoReturn:
    """Say what is wrong with a file; names of files stay short of the whole path where they can."""
    raise EffcError(Diagnostic(code, f"`{path.name}` cannot be read", notes=(why,), help=help))


def read_json(path: Path, limit: int = MAX_HEADER) -> Any:
    """A JSON file of bounded size without duplicate keys.

    Raises:
        EffcError: E414 missing, too large, not UTF-8, not JSON, nested too deeply, or a key stands twice.
    """
    try:
        size = path.stat().st_size
        if size > limit:
            refuse("E414", path, f"it has {size} bytes; at most {limit} make sense")
        return parse_json(path.read_bytes(), path)
    except OSError as problem:
        refuse("E414", path, f"{problem.strerror or problem}")


def parse_json(raw: bytes, path: Path) -> Any:
    """JSON text to a value. Raises EffcError E414 as `read_json` does."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            twice = next(key for key, count in counts.items() if count > 1)
            refuse("E414", path, f"the key {twice[:60]!r} stands twice")
        return found

    try:
        return json.loads(raw.decode(), object_pairs_hook=unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as problem:
        refuse("E414", path, f"it is not JSON that can be read: {str(problem)[:120]}")


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON number")


def read_header(path: Path) -> dict[str, TensorRef]:
    """The tensors of one safetensors file, by name.

    Raises:
        EffcError: E415 for a header that is cut off, oversized, or describes tensors that overlap, leave
            gaps, lie outside the file or do not have the bytes that their shape needs.
    """
    try:
        size = path.stat().st_size
        with path.open("rb", buffering=0) as file:
            first = file.read(8)
            length = int.from_bytes(first, "little")
            if len(first) < 8 or length > size - 8:
                refuse("E415", path, f"the header should have {length} bytes, and the file has {size} in all")
            if not 2 <= length <= MAX_HEADER:
                refuse("E415", path, f"the header has {length} bytes; 2 to {MAX_HEADER} make sense")
            raw = file.read(length)
    except OSError as problem:
        refuse("E415", path, f"{problem.strerror or problem}")
    header = parse_json(raw, path)
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        refuse("E415", path, f"the header is no table of at most {MAX_TENSORS} tensors")
    header.pop("__metadata__", None)
    found = {name: _entry(path, name, entry, 8 + length) for name, entry in header.items()}
    _cover(path, found, 8 + length, size)
    return found


def _entry(path: Path, name: str, entry: Any, base: int) -> TensorRef:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(end)]}:
            pass
        case _:
            refuse("E415", path, f"the entry of {name[:80]!r} lacks a dtype, a shape or two offsets")
    if dtype not in DTYPES:
        refuse("E415", path, f"{name[:80]!r} has the dtype {dtype[:20]!r}; known are {', '.join(DTYPES)}")
    if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
        refuse("E415", path, f"{name[:80]!r} has the shape {str(shape)[:60]}, which no tensor has")
    if not 0 <= start <= end:
        refuse("E415", path, f"{name[:80]!r} lies from byte {start} to {end}")
    count = 1
    for n in shape:
        count *= n
    nbytes = count * DTYPES[dtype].itemsize
    if nbytes != end - start:
        refuse("E415", path, f"{name[:80]!r} needs {nbytes} bytes for its shape and has {end - start}")
    return TensorRef(path, base + start, nbytes, DTYPES[dtype], tuple(shape))


def _cover(path: Path, found: Mapping[str, TensorRef], base: int, size: int) -> None:
    """Tensors follow each other without gap or overlap and end where the file ends."""
    at, before = base, "the header"
    for name, ref in sorted(found.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if ref.offset != at:
            what = "overlaps" if ref.offset < at else "leaves a gap after"
            refuse("E415", path, f"{name[:80]!r} {what} {before[:80]!r}")
        at, before = ref.offset + ref.nbytes, name
    if at != size:
        refuse("E415", path, f"the tensors end at byte {at}, the file at {size}")


def within(folder: Path, name: str, root: Path | None = None) -> Path:
    """A file of a folder; links may lead anywhere inside `root` (the folder itself where None).

    Raises:
        EffcError: E416 when the name, or a link, leads out, or what is there is no regular file.
    """
    path = folder / name
    try:
        real = path.resolve()
    except (OSError, RuntimeError, ValueError) as problem:  # a loop of links, a NUL in the name
        refuse("E416", folder, f"{name[:120]!r} leads nowhere: {problem.args[0]!s:.80}")
    if not real.is_relative_to((root or folder).resolve()):
        refuse("E416", folder, f"{name[:120]!r} leads out of the folder")
    if real.exists() and not real.is_file():
        refuse("E416", folder, f"{name[:120]!r} is no regular file")
    return path


def read_folder(folder: Path, root: Path | None = None) -> dict[str, TensorRef]:
    """All tensors of a model folder: one file, or shards named by an index.

    Raises:
        EffcError: E414, E415, E416 as above, E417 when there are no safetensors, E418 when a shard is
            missing, two shards hold the same tensor, or index and shards disagree.
    """
    index = within(folder, "model.safetensors.index.json", root)
    if index.exists():
        return _sharded(folder, index, root)
    single = within(folder, "model.safetensors", root)
    if single.exists():
        return read_header(single)
    loose = sorted(p.name for p in folder.glob("*.safetensors"))
    if len(loose) == 1:
        return read_header(within(folder, loose[0], root))
    pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt"))
    if pickles:
        note = f"it holds {pickles[0]}, a pickle, which can run code when it is read"
        refuse(
            "E417", folder, note, "save the model again with `save_pretrained(..., safe_serialization=True)`"
        )
    refuse("E417", folder, "there is no model.safetensors and no model.safetensors.index.json")


def _sharded(folder: Path, index: Path, root: Path | None) -> dict[str, TensorRef]:
    data = read_json(index)
    table = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(table, dict) or not table:
        refuse("E418", index, "it has no table `weight_map`")
    shards: dict[str, dict[str, TensorRef]] = {}
    for name in sorted(set(map(str, table.values()))):
        if not _SHARD.match(name):
            refuse("E416", index, f"the shard {name[:120]!r} is no plain file name")
        path = within(folder, name, root)
        if not path.exists():
            refuse("E418", index, f"the shard {name} is missing")
        shards[name] = read_header(path)
    found: dict[str, TensorRef] = {}
    for name, ref in _entries(shards):
        if name in found:
            refuse("E418", index, f"{name[:80]!r} stands in {found[name].file.name} and in {ref.file.name}")
        found[name] = ref
    if lost := sorted(name for name, shard in table.items() if name not in shards[str(shard)]):
        refuse("E418", index, f"{lost[0][:80]!r} is not in {table[lost[0]]} ({len(lost)} such)")
    return found


def _entries(shards: Mapping[str, Mapping[str, TensorRef]]) -> Iterator[tuple[str, TensorRef]]:
    for shard in shards.values():
        yield from shard.items()
