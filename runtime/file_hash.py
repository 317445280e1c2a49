"""BLAKE3 of whole files: one block is read while the one before it is hashed, on all cores."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from blake3 import blake3

BLOCK = 1 << 22
"""Bytes read at once: enough to give each core a part, little enough to stay in its cache."""
SMALL = 1 << 24
"""Bytes below which a file is read block after block: a thread would not pay."""


def hash_of(path: Path) -> str:
    """BLAKE3 of a file, in hexadecimal."""
    digest = blake3(max_threads=blake3.AUTO)
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        for block in (blocks if size < SMALL else _ahead)(file.fileno(), 0, size):
            digest.update(block)
    return digest.hexdigest()


def blocks(descriptor: int, start: int, stop: int) -> Iterator[memoryview]:
    """The bytes from `start` to `stop`, in one buffer that every block uses again."""
    buffer = memoryview(bytearray(min(BLOCK, max(0, stop - start))))
    while start < stop and (got := os.preadv(descriptor, [buffer[: stop - start]], start)):
        yield buffer[:got]
        start += got


def _ahead(descriptor: int, start: int, stop: int) -> Iterator[memoryview]:
    """The same in two buffers: the next block is read while its user works on this one."""
    buffers = [memoryview(bytearray(BLOCK)) for _ in range(2)]
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(os.preadv, descriptor, [buffers[0][: stop - start]], start)
        while got := coming.result():
            block, start = buffers[0][:got], start + got
            buffers.reverse()
            coming = reader.submit(os.preadv, descriptor, [buffers[0][: max(0, stop - start)]], start)
            yield block
