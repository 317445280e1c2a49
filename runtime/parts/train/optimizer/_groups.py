"""Which parameters decay: matrices do, vectors (gains, biases) do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def decayed(parameters: Sequence[tuple[str, nn.Parameter]], wd: float) -> list[dict[str, Any]]:
    """Two groups for a torch optimizer, empty ones left out."""
    matrices = [p for _, p in parameters if p.dim() >= 2]
    vectors = [p for _, p in parameters if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": wd}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
