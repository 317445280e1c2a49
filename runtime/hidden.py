"""Hidden states of all calibration sequences between two layers, in memory or spilled to files when large.

Shapes: one tensor [B, T, D] for each batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

LIMIT = 1 << 29
"""Bytes of hidden states that stay in memory; what comes beyond goes to files."""


@dataclass(frozen=True, slots=True)
class _Spilled:
    path: Path
    shape: torch.Size
    dtype: torch.dtype

    def read(self) -> Tensor:
        raw = torch.from_numpy(np.fromfile(self.path, dtype=np.uint8))
        return raw.view(self.dtype).view(self.shape)


@dataclass(slots=True)
class Hidden:
    """The tensors of all batches, replaced one by one as they pass through a layer."""

    folder: Path | None = None
    """Where to spill; None keeps everything in memory."""
    limit: int = field(default_factory=lambda: LIMIT)
    _held: dict[int, Tensor | _Spilled] = field(default_factory=dict)
    _bytes: int = 0

    def put(self, batch: int, states: Tensor) -> None:
        """Keep the states of a batch in place of those it had."""
        old = self._held.pop(batch, None)
        if isinstance(old, Tensor):
            self._bytes -= old.nbytes
        if self.folder is None or self._bytes + states.nbytes <= self.limit:
            self._bytes += states.nbytes
            self._held[batch] = states
            return
        path = self.folder / f"hidden-{batch}.bin"
        states.contiguous().view(torch.uint8).numpy().tofile(path)
        self._held[batch] = _Spilled(path, states.shape, states.dtype)

    def get(self, batch: int) -> Tensor:
        held = self._held[batch]
        return held.read() if isinstance(held, _Spilled) else held

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._held))

    def drop(self) -> None:
        """Forget everything and remove the files."""
        for held in self._held.values():
            if isinstance(held, _Spilled):
                held.path.unlink(missing_ok=True)
        self._held.clear()
        self._bytes = 0
