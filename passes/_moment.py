"""The second moment of a layer's inputs, gathered batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor


class Moment:
    """C = 1/N sum x x^T over all inputs x [i] seen, float32."""

    def __init__(self, inputs: int) -> None:
        self.total = torch.zeros(inputs, inputs)
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """x [N, i]"""
        wide = x.float()
        self.total.addmm_(wide.T, wide)
        self.rows += x.shape[0]

    def state(self) -> dict[str, Tensor]:
        return {"total": self.total, "rows": torch.tensor(self.rows)}

    def mean(self) -> Tensor:
        return self.total / max(1, self.rows)
