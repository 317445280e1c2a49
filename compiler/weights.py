"""Weights that are read when needed: a lazy tensor knows its shape and dtype and how to be read."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor's bytes lie, row after row, in the dtype it has."""

    file: Path
    offset: int
    linkable: bool = False
    """Whether the file may get further names. Only the store allows that, never a file of a user."""


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor on disk (or made from tensors there by renaming, transposing, splitting, stacking)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """Reads the tensor anew at every call; no memory is kept."""
    stored: Stored | None = None
    """Set where a file holds the tensor as it is, so that merges and hashes can stream it."""

    @property
    def nbytes(self) -> int:
        count = 1
        for n in self.shape:
            count *= n
        return count * self.dtype.itemsize


WeightSource = MutableMapping[str, LazyTensor]
"""Canonical tensor name -> lazy tensor. What a stage has written is no longer in it."""


def resident(tensor: Tensor) -> LazyTensor:
    """A tensor in memory, seen as a lazy one."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)
