"""LinearLossSpec: losses of the softmax over x W^T for every row, and their gradients, tile by tile."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from effc.kernels.kernel import KernelSpec


class Tile(BaseModel):
    """What one program of a product holds at once."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: Literal[16, 32, 64, 128] = 128
    columns: Literal[16, 32, 64, 128, 256] = 256
    depth: Literal[16, 32, 64, 128] = 64
    """of one turn of the loop"""
    warps: Literal[4, 8] = 8
    stages: int = Field(default=3, ge=1, le=6)


class LinearLossSpec(KernelSpec, frozen=True):
    """loss = lse - (1 - e) l[label] - e mean(l) + z lse^2, l = cap tanh(x W^T / cap), lse = log sum exp l.

    x and W bfloat16, logits float32. A negative label gives loss 0 and no gradient. Going back, the
    gradients of the logits are bfloat16 and exist for `chunk` columns at a time.
    """

    op: ClassVar[str] = "linear_loss"
    version: ClassVar[int] = 1

    smoothing: float = Field(default=0.0, ge=0, lt=1)
    """e, the share of the target that lies on all labels equally"""
    z: float = Field(default=0.0, ge=0)
    cap: float = Field(default=0.0, ge=0)
    """0 for logits as they are"""
    shares: int = Field(default=16, ge=1, le=128)
    """Programs that share the labels of a row, a field of the order of sums."""
    chunk: int = Field(default=8192, ge=16)
    """Columns of logits that have gradients in memory at once, a field of the order of sums in dx."""
    losses: Tile = Tile(columns=128, stages=4)
    """of the kernels that see logits; chosen, as those below, by counts of registers and shared memory"""
    of_weights: Tile = Tile()
    of_rows: Tile = Tile(columns=128, stages=4)
    """of the gradient of x, which begins with what earlier chunks gave: 256 columns spill registers"""

    def scratch(self, tokens: int, width: int, labels: int) -> int:
        """Bytes beside inputs and results: gradients of a chunk of logits, dx before it is rounded."""
        several = labels > self.chunk
        return 2 * tokens * min(self.chunk, labels) + (4 * tokens * width if several else 0)


def refuses(spec: LinearLossSpec, tokens: int, width: int, labels: int) -> str | None:
    """Why x [tokens, width] and W [labels, width] cannot take the kernel; None when they can."""
    depth = max(spec.losses.depth, spec.of_weights.columns, spec.of_rows.columns)
    if width % depth:
        return f"rows of {width} are not a multiple of {depth}"
    if max(tokens * width, tokens * min(spec.chunk, labels), labels) >= 2**31:
        return f"x [{tokens}, {width}] and chunks of {spec.chunk} labels need offsets beyond 31 bits"
    return None
