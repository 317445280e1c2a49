"""The second moment of a layer's inputs, gathered batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


class Moment:
    """C = 1/N sum x x^T over all inputs x [i] seen, float32. The mean takes the place of the sum."""

    def __init__(self, inputs: int) -> None:
        self.total = torch.zeros(inputs, inputs)
        self.rows = 0
        self._closed = False

    def add(self, x: Tensor) -> None:
        """x [N, i]

        Raises:
            RuntimeError: once the mean was taken.
        """
        if self._closed:
            raise RuntimeError("inputs were added behind the mean")
        wide = x.float()
        with _exact_halves() if x.dtype == torch.bfloat16 else nullcontext():
            self.total.addmm_(wide.T, wide)
        self.rows += x.shape[0]

    def state(self) -> dict[str, Tensor]:
        return {"total": self.total, "rows": torch.tensor(self.rows)}

    def mean(self) -> Tensor:
        """C, in the memory of the sum: at 11008 inputs a second one is 500 MB."""
        if not self._closed:
            self._closed = True
            self.total.div_(max(1, self.rows))
        return self.total


@contextmanager
def _exact_halves() -> Iterator[None]:
    """Multiply float32 numbers that are bfloat16 ones in bfloat16: products and sums stay float32.

    Nothing is lost, since the numbers have no more bits, and units made for it are three times as fast.
    """
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if not known.get("amx_bf16"):
        yield
        return
    matmul: Any = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009, its type is not declared
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
