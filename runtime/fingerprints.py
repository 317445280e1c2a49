"""BLAKE3 of safetensors files and of the tensors in them, on all cores."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from blake3 import blake3

from effc.compiler.checkpoint import TensorRef
from effc.runtime import durable
from effc.runtime.file_hash import blocks, hash_of

__all__ = ["hash_of", "hashes_of"]


def hashes_of(path: Path, tensors: Mapping[str, TensorRef]) -> tuple[str, dict[str, str]]:
    """BLAKE3 of a safetensors file, and for each of its tensors what a file of it alone would have.

    `tensors` are those that the file holds, each with its place. The file is read twice at the same time:
    each byte goes into two hashes, and a core takes one.
    """
    found: dict[str, str] = {}
    with ThreadPoolExecutor(1) as beside, path.open("rb", buffering=0) as file:
        whole = beside.submit(hash_of, path)
        for name, ref in sorted(tensors.items(), key=lambda item: item[1].offset):
            empty = torch.empty(ref.shape, dtype=ref.dtype, device="meta")
            own = blake3(durable.head_of({durable.ENTRY: empty}), max_threads=blake3.AUTO)
            for block in blocks(file.fileno(), ref.offset, ref.offset + ref.nbytes):
                own.update(block)
            found[name] = own.hexdigest()
        return whole.result(), found
