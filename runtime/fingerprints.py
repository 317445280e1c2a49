"""BLAKE3 of files and of the tensors in them: read once, into one buffer, on all cores."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from blake3 import blake3

from effc.compiler.checkpoint import TensorRef
from effc.runtime import durable

BLOCK = 1 << 22
"""Bytes read at once: enough to give each core a part, little enough to stay in its cache."""


def hash_of(path: Path) -> str:
    """BLAKE3 of a file, in hexadecimal."""
    digest = blake3(max_threads=blake3.AUTO)
    with path.open("rb", buffering=0) as file:
        for block in _blocks(file.fileno(), 0, os.fstat(file.fileno()).st_size):
            digest.update(block)
    return digest.hexdigest()


def hashes_of(path: Path, tensors: Mapping[str, TensorRef]) -> tuple[str, dict[str, str]]:
    """BLAKE3 of a safetensors file, and for each of its tensors what a file of it alone would have.

    `tensors` are all that the file holds, each with its place.
    """
    whole = blake3(max_threads=blake3.AUTO)
    found: dict[str, str] = {}
    with path.open("rb", buffering=0) as file:
        at = 0
        for name, ref in sorted(tensors.items(), key=lambda item: item[1].offset):
            for block in _blocks(file.fileno(), at, ref.offset):
                whole.update(block)
            own = blake3(
                durable.head_of({durable.ENTRY: torch.empty(ref.shape, dtype=ref.dtype, device="meta")})
            )
            at = ref.offset + ref.nbytes
            for block in _blocks(file.fileno(), ref.offset, at):
                whole.update(block)
                own.update(block)
            found[name] = own.hexdigest()
        for block in _blocks(file.fileno(), at, os.fstat(file.fileno()).st_size):
            whole.update(block)
    return whole.hexdigest(), found


def _blocks(descriptor: int, start: int, stop: int) -> Iterator[memoryview]:
    """The bytes from `start` to `stop`, in one buffer that every block uses again."""
    buffer = memoryview(bytearray(min(BLOCK, max(0, stop - start))))
    while start < stop and (got := os.preadv(descriptor, [buffer[: stop - start]], start)):
        yield buffer[:got]
        start += got
