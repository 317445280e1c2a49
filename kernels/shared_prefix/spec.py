"""SharedPrefixSpec: attention of one new token of each sequence over a path of segments of keys."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from effc.kernels.kernel import KernelSpec

FEW, MANY = 16, 128
"""Rows of a program, a row being a query head of a sequence: of segments with few, and with many."""


class SharedPrefixSpec(KernelSpec, frozen=True):
    """o = softmax(cap(scale q k^T)) v over all segments of a sequence's path; all bfloat16, sums float32.

    A segment is read once for up to 128 rows, those of all sequences that see it; what its programs give are
    outputs and base-2 logarithms of sums of weights, which one more kernel brings together.
    """

    op: ClassVar[str] = "shared_prefix_gpu"
    version: ClassVar[int] = 1

    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    head_dim: int = Field(ge=16, le=256, multiple_of=16)
    scale: float = Field(gt=0)
    cap: float | None = Field(default=None, gt=0)
    """Scores become cap tanh(score / cap); None: they stay."""
    keys: Literal[64, 128] = 64
    """Keys of a turn."""
    least: int = Field(default=256, gt=0)
    """Keys that a program has at least, where a segment has so many."""
    programs: int = Field(default=528, gt=0)
    """Programs that a plan aims at by splitting segments: four on each of 132 multiprocessors."""

    @model_validator(mode="after")
    def _possible(self) -> SharedPrefixSpec:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads do not divide over {self.kv_heads} key heads")
        if self.group > FEW:
            raise ValueError(f"{self.group} query heads share a key head, a program takes {FEW}")
        return self

    @property
    def group(self) -> int:
        """Query heads that share one kv head."""
        return self.heads // self.kv_heads

    def bytes(self, tokens: int, rows: int, parts: int) -> int:
        """Of `tokens` keys and values in all segments, each once, `rows` queries, `parts` partial results."""
        each = 4 * self.kv_heads * self.head_dim * tokens + 4 * self.heads * self.head_dim * rows
        return each + 8 * parts * self.heads * (self.head_dim + 1)


def refuses(spec: SharedPrefixSpec, rows: int, tokens: int, window: int | None = None) -> str | None:
    """Why `rows` sequences over a pool of `tokens` cannot take the kernel; None when they can."""
    if window is not None:
        return f"a window of {window} tokens, of which a shared segment is not the same part for all"
    if max(tokens * spec.kv_heads, rows * spec.heads) * spec.head_dim >= 2**31:
        return f"a pool of {tokens} tokens and {rows} sequences need offsets beyond 31 bits"
    return None
