"""AttentionGpuSpec: causal attention, with or without a window, of grouped heads over packed sequences."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from effc.kernels.kernel import KernelSpec


class Tile(BaseModel):
    """What one program holds at once."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    queries: Literal[32, 64, 128]
    keys: Literal[32, 64, 128]
    warps: Literal[4, 8]
    stages: int = Field(ge=1, le=4)


FORWARD = {
    64: Tile(queries=128, keys=64, warps=8, stages=3),
    128: Tile(queries=128, keys=64, warps=8, stages=3),
    256: Tile(queries=64, keys=32, warps=4, stages=2),
}
OF_KEYS = {
    64: Tile(queries=64, keys=128, warps=8, stages=2),
    128: Tile(queries=32, keys=128, warps=8, stages=2),
    256: Tile(queries=32, keys=32, warps=8, stages=1),
}
OF_QUERIES = {
    64: Tile(queries=128, keys=64, warps=8, stages=2),
    128: Tile(queries=128, keys=64, warps=8, stages=2),
    256: Tile(queries=128, keys=32, warps=8, stages=1),
}
"""By the width of a head at most; chosen by counts of registers and instructions, not by time. With heads of
128, 64 queries do not fit the registers beside dk and dv of 128 keys; with heads of 256, dk and dv of 64 keys
do not, and 32 are too few for wgmma."""


class AttentionGpuSpec(KernelSpec, frozen=True):
    """o = softmax(cap(scale q k^T)) v over the keys of a query's own sequence that it may see; all bfloat16.

    Sums are float32; weights are rounded to bfloat16 before they multiply v, and their slopes before they
    multiply q and k.
    """

    op: ClassVar[str] = "attention_gpu"
    version: ClassVar[int] = 1

    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    head_dim: int = Field(ge=16, le=256, multiple_of=16)
    scale: float = Field(gt=0)
    cap: float | None = Field(default=None, gt=0)
    """Scores become cap tanh(score / cap); None: they stay."""
    causal: bool = True
    window: int | None = Field(default=None, gt=0)
    """Keys that a query may see, its own included; None: all that it may."""
    forward: Tile
    of_keys: Tile
    """of the backward kernel whose programs hold keys: dk and dv"""
    of_queries: Tile
    """of the backward kernel whose programs hold queries: dq"""

    @model_validator(mode="before")
    @classmethod
    def _fitting(cls, given: Any) -> Any:
        width = given.get("head_dim") if isinstance(given, dict) else None
        kind = next((most for most in FORWARD if isinstance(width, int) and width <= most), None)
        if kind is None:
            return given
        tiles = {"forward": FORWARD[kind], "of_keys": OF_KEYS[kind], "of_queries": OF_QUERIES[kind]}
        return tiles | given

    @model_validator(mode="after")
    def _possible(self) -> AttentionGpuSpec:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads do not divide over {self.kv_heads} key heads")
        if self.window is not None and not self.causal:
            raise ValueError("a window ends at the query's own key, so its attention is causal")
        for tile in (self.forward, self.of_queries):
            if tile.warps == 8 and tile.queries != 128:
                raise ValueError("8 warps take 128 queries, 64 to every 4")
        return self

    @property
    def group(self) -> int:
        """Query heads that share one kv head."""
        return self.heads // self.kv_heads

    def operations(self, lengths: list[int]) -> int:
        """Multiplications and additions of the forward pass over these lengths, masked ones left out."""
        reach = self.window or max(lengths, default=0)
        pairs = sum(min(i + 1, reach) for n in lengths for i in range(n))
        pairs = pairs if self.causal else sum(n * n for n in lengths)
        return 4 * pairs * self.heads * self.head_dim


def refuses(spec: AttentionGpuSpec, tokens: int) -> str | None:
    """Why attention over `tokens` in all cannot take the kernel; None when it can."""
    if tokens * spec.heads * spec.head_dim >= 2**31:
        return f"{tokens} tokens of {spec.heads} heads need offsets beyond 31 bits"
    return None
