"""QuantLinearSpec: y = epilogue(x W^T) with W of 2, 3, 4 or 8 bits, in groups along K."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from effc.kernels.epilogue import ACTIVATIONS, EPILOGUES
from effc.kernels.kernel import KernelSpec

BLOCK = 64
"""Output channels that lie together: four vectors of 16."""


class QuantLinearSpec(KernelSpec, frozen=True):
    """x [M, K] float32 becomes signed bytes, one scale for each row and group; sums in a group are exact.

    W is (code - zero code) scale, codes unsigned of b bits; the zero code is 2^(b-1) when symmetric.
    """

    op: ClassVar[str] = "quant_linear"
    version: ClassVar[int] = 5

    bits: Literal[2, 3, 4, 8]
    group: int = Field(ge=0)
    """Columns that share a scale; 0 when the whole row does."""
    symmetric: bool = True
    scale: Literal["float16", "bfloat16"] = "float16"
    paired: bool = False
    """Rows of two matrices, 32 and 32 of each block of 64; the result is activation(first) * second."""
    epilogue: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _possible(self) -> QuantLinearSpec:
        unknown = [name for name in self.epilogue if name not in EPILOGUES]
        if unknown:
            raise ValueError(f"no epilogue is called {', '.join(unknown)}; there are {', '.join(EPILOGUES)}")
        if self.group % self.columns:
            raise ValueError(
                f"a group of {self.group} columns; a multiple of {self.columns} at {self.bits} bits"
            )
        if self.paired and (not self.epilogue or self.epilogue[0] not in ACTIVATIONS):
            raise ValueError("a paired kernel begins its epilogue with the activation of its first half")
        return self

    @property
    def columns(self) -> int:
        """Columns that one step of the inner loop takes: what one vector of bytes holds for 16 channels."""
        return {2: 16, 3: 32, 4: 8, 8: 4}[self.bits]

    @property
    def mid(self) -> int:
        """The code that stands for zero when symmetric."""
        return 1 << (self.bits - 1)

    def groups(self, k: int) -> int:
        """Groups in a row of k columns."""
        return k // self.group if self.group else 1

    def group_bytes(self, k: int) -> int:
        """Bytes of one group of one block: scales, zero codes, codes."""
        width = self.group or k
        return BLOCK * (2 + (0 if self.symmetric else 1)) + BLOCK * width * self.bits // 8

    def bytes(self, n: int, k: int) -> int:
        """Bytes of the packed matrix [n, k], which is what batch-1 decoding must read."""
        return -(-n // BLOCK) * self.groups(k) * self.group_bytes(k)


def refuses(spec: QuantLinearSpec, n: int, k: int) -> str | None:
    """Why a matrix [n, k] cannot take the kernel; None when it can."""
    width = spec.group or k
    if k % width:
        return f"K = {k} is not a multiple of the group of {width}"
    if width % spec.columns:
        return f"a row of {width} columns is not a multiple of {spec.columns}"
    if width * 127 * ((1 << spec.bits) - 1) >= 2**31:
        return f"sums over {width} columns of {spec.bits} bits pass 32 bits"
    return None
