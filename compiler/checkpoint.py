"""Safetensors files read with suspicion: every header is checked before a byte is allocated for a tensor.

A file is 8 bytes of header length, little-endian, the header as JSON, then the tensors' bytes:
{"name": {"dtype": "BF16", "shape": [o, i], "data_offsets": [start, stop]}, ..., "__metadata__": {...}}.
Tensors are read with pread into memory of their own, never by mmap, which counts as resident.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from effc.compiler import strict_json
from effc.compiler.weights import LazyTensor, Stored
from effc.specs.diagnostic import Diagnostic, EffcError

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
"""Names that safetensors gives to dtypes."""
SPELLED = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 16 << 20
MAX_TENSORS = 100_000
MAX_NAME = 512
MAX_RANK = 8
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PIECE = 1 << 30
"""Bytes asked of one pread; the system gives at most 2 GiB at once."""


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor in a file: where its bytes lie and what they mean."""

    file: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self, rows: tuple[int, int] | None = None) -> Tensor:
        """The tensor, or its rows [start, stop) along the first dimension, in memory of its own.

        Raises:
            EffcError: E431 when the file has become shorter than its header says.
        """
        start, shape, size = self.offset, self.shape, self.nbytes
        if rows is not None:
            low, high = max(0, rows[0]), min(rows[1], self.shape[0])
            step = self.nbytes // self.shape[0] if self.shape[0] else 0
            start, size = start + low * step, max(0, high - low) * step
            shape = (max(0, high - low), *self.shape[1:])
        if size == 0:
            return torch.empty(shape, dtype=self.dtype)
        raw = torch.empty(size, dtype=torch.uint8)
        self._fill(memoryview(raw.numpy()), start)
        return raw.view(self.dtype).reshape(shape)

    def lazy(self) -> LazyTensor:
        """The same as a source of weights."""
        return LazyTensor(self.shape, self.dtype, self.read, Stored(self.file, self.offset))

    def _fill(self, into: memoryview, offset: int) -> None:
        descriptor = os.open(self.file, os.O_RDONLY)
        try:
            done = 0
            while done < len(into):
                got = os.preadv(descriptor, [into[done : done + _PIECE]], offset + done)
                if got == 0:
                    _refuse("E431", self.file, f"it ends {len(into) - done} bytes before a tensor does")
                done += got
        finally:
            os.close(descriptor)


def read_header(file: Path) -> dict[str, TensorRef]:
    """Every tensor of a safetensors file by name, in the order of their bytes. Reads the header alone.

    Raises:
        EffcError: E430 for a header that is malformed or inconsistent, E431 for a file that is cut short.
    """
    with file.open("rb") as stream:
        total = os.fstat(stream.fileno()).st_size
        head = stream.read(8)
        if len(head) < 8:
            _refuse("E431", file, f"it has {total} bytes, too few for a header")
        length = int.from_bytes(head, "little")
        if length > MAX_HEADER:
            _refuse("E430", file, f"the header claims {length} bytes, the limit is {MAX_HEADER}")
        if 8 + length > total:
            _refuse("E431", file, f"the header claims {length} bytes, the file has {total}")
        table = strict_json.parse(stream.read(length), file.name)
    if not isinstance(table, dict):
        _refuse("E430", file, "the header is no object")
    _check_metadata(file, table.pop("__metadata__", {}))
    if len(table) > MAX_TENSORS:
        _refuse("E430", file, f"it names {len(table)} tensors, the limit is {MAX_TENSORS}")
    begin = 8 + length
    refs = {name: _ref(file, name, entry, begin, total) for name, entry in table.items()}
    return _ordered(file, refs, begin, total)


def read_index(folder: Path, root: Path | None = None) -> dict[str, TensorRef]:
    """Every tensor of a folder: those of model.safetensors, or of all shards that its index names.

    `root`: the folder that links may lead into (the folder itself when None).

    Raises:
        EffcError: E441 when there are no safetensors or shards are missing (all are named), E434 when there
            are only pickles, E432 when index and shards disagree; as `read_header`.
    """
    if strict_json.has(folder, INDEX):
        return _sharded(folder, root)
    if strict_json.has(folder, SINGLE):
        return read_header(strict_json.inside(folder, SINGLE, root))
    pickles = sorted(p.name for ending in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(ending))
    if pickles:
        raise EffcError(
            Diagnostic(
                "E434",
                f"`{folder.name}` holds its weights as a pickle, which can run code when it is read",
                notes=(f"found {', '.join(pickles[:3])}",),
                help="where you trust it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) "
                "writes safetensors",
            )
        )
    note = f"looked in {folder} for {SINGLE} and {INDEX}"
    raise EffcError(Diagnostic("E441", f"`{folder.name}` holds no safetensors", notes=(note,)))


def _sharded(folder: Path, root: Path | None) -> dict[str, TensorRef]:
    table = strict_json.read(folder, INDEX, root).get("weight_map")
    if not isinstance(table, dict) or not table or len(table) > MAX_TENSORS:
        _refuse("E432", folder / INDEX, "`weight_map` is no table of tensors")
    if not all(isinstance(file, str) for file in table.values()):
        _refuse("E432", folder / INDEX, "`weight_map` holds something else than file names")
    files = sorted(set(table.values()))
    bad = next((f for f in files if not f.endswith(".safetensors")), None)
    if bad is not None:
        _refuse("E432", folder / INDEX, f"{bad[:80]!r} is no safetensors file")
    plain = [f for f in files if "/" not in f and "\\" not in f]
    missing = [f for f in plain if not (folder / f).exists()]
    if missing:
        note = f"missing: {', '.join(missing[:8])}" + (f" and {len(missing) - 8} more" if missing[8:] else "")
        title = f"{len(missing)} of {len(files)} shards of `{folder.name}` are missing"
        raise EffcError(Diagnostic("E441", title, notes=(note,), help="download the folder again, all of it"))
    found: dict[str, TensorRef] = {}
    for name in files:
        for tensor, ref in read_header(strict_json.inside(folder, name, root)).items():
            if tensor in found:
                _refuse("E432", folder / INDEX, f"`{tensor}` lies in two shards, {name} and {found[tensor].file.name}")
            if table.get(tensor, name) != name:
                _refuse("E432", folder / INDEX, f"`{tensor}` lies in {name}, the index says {table[tensor]}")
            found[tensor] = ref
    absent = sorted(table.keys() - found.keys())
    if absent:
        _refuse("E432", folder / INDEX, f"{len(absent)} tensors lie in no shard, such as `{absent[0][:80]}`")
    return found


def _check_metadata(file: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _refuse("E430", file, "`__metadata__` is no table of strings")


def _ref(file: Path, name: str, entry: Any, begin: int, total: int) -> TensorRef:
    """One tensor of a header, checked on its own."""
    if not name or len(name) > MAX_NAME or not name.isprintable():
        _refuse("E430", file, f"{name[:60]!r} is no name of a tensor")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse("E430", file, f"`{name}` has not exactly dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        _refuse("E430", file, f"`{name}` has the unknown dtype {str(entry['dtype'])[:40]!r}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _counts(shape) or len(shape) > MAX_RANK:
        _refuse("E430", file, f"`{name}` has no shape of at most {MAX_RANK} sizes: {str(shape)[:60]}")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse("E430", file, f"`{name}` has no offsets from start to stop: {str(offsets)[:60]}")
    start, stop = offsets
    size = math.prod(shape) * dtype.itemsize
    if stop - start != size:
        _refuse("E430", file, f"`{name}` needs {size} bytes for its shape, its offsets span {stop - start}")
    if begin + stop > total:
        _refuse("E431", file, f"`{name}` ends at byte {begin + stop}, the file at {total}")
    return TensorRef(file, begin + start, size, dtype, tuple(shape))


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


def _ordered(file: Path, refs: dict[str, TensorRef], begin: int, total: int) -> dict[str, TensorRef]:
    """In the order of their bytes; they must follow each other without gap or overlap to the end."""
    ordered = dict(sorted(refs.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    place = begin
    for name, ref in ordered.items():
        if ref.offset != place:
            what = "overlaps the tensor before it" if ref.offset < place else "leaves a gap before it"
            _refuse("E430", file, f"`{name}` {what}")
        place += ref.nbytes
    if place != total:
        _refuse("E430", file, f"{total - place} bytes at its end belong to no tensor")
    return ordered


def _refuse(code: str, file: Path, reason: str) -> NoReturn:
    raise EffcError(Diagnostic(code, f"`{file.name}` cannot be read safely", notes=(reason, f"in {file.parent}")))
