"""DenseLinearSpec: y = epilogue(x W^T) with W of float32, bfloat16 or float16 as a checkpoint stores it."""

from __future__ import annotations

from typing import ClassVar

from pydantic import model_validator

from effc.kernels.cpu.stored import Stored
from effc.kernels.epilogue import ACTIVATIONS, EPILOGUES
from effc.kernels.kernel import KernelSpec

BLOCK = 16
"""Output channels of one item: one vector of results."""


class DenseLinearSpec(KernelSpec, frozen=True):
    """x [M, K] float32, W [N, K] row-major, sums in float32: 16 partial sums along K, then their sum.

    The order of a sum is that of K alone: not of M, N, threads or how many rows are computed at once.
    """

    op: ClassVar[str] = "dense_linear"
    version: ClassVar[int] = 4

    weight: Stored = "float32"
    paired: bool = False
    """Two matrices [N, K]; the result is activation(x W^T) * (x W2^T)."""
    epilogue: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _possible(self) -> DenseLinearSpec:
        unknown = [name for name in self.epilogue if name not in EPILOGUES]
        if unknown:
            raise ValueError(f"no epilogue is called {', '.join(unknown)}; there are {', '.join(EPILOGUES)}")
        if self.paired and (not self.epilogue or self.epilogue[0] not in ACTIVATIONS):
            raise ValueError("a paired kernel begins its epilogue with the activation of its first half")
        return self

    def bytes(self, n: int, k: int) -> int:
        """Bytes of W (of both when paired), which is what batch-1 decoding must read."""
        return n * k * (4 if self.weight == "float32" else 2) * (2 if self.paired else 1)
