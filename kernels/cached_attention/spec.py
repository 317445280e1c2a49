"""CachedAttentionSpec: causal attention of new tokens to the keys that their sequences hold in a cache."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from effc.kernels.kernel import KernelSpec

KEYS = 64
"""Keys that one step of the running softmax takes; a cache holds a multiple of it for each sequence."""


class CachedAttentionSpec(KernelSpec, frozen=True):
    """y = softmax(cap(scale q k^T)) v over keys up to each token's own position, `window` of them at most.

    Symbols: H query heads, Hk kv heads, G = H / Hk, h width of a head, S keys a sequence has room for.
    The key at position p is the cache's number p, or p mod S in a ring.
    """

    op: ClassVar[str] = "cached_attention"
    version: ClassVar[int] = 2

    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    scale: float
    """What scores are multiplied by; the written queries hold it already."""
    cap: float | None = Field(default=None, gt=0)
    """Scores become cap tanh(score / cap)."""
    rotated: int = Field(default=0, ge=0)
    """Dimensions of a head that turn with the position, in halves; 0: none."""
    norm: float = Field(default=0.0, ge=0)
    """eps of the RMS norms over each head of q and k, before they turn; 0: no norms."""
    norm_offset: float = 0.0
    """What is added to the gains of these norms."""
    causal: bool = True
    window: int | None = Field(default=None, gt=0)
    """Keys that a token may see, its own included; None: all before it."""
    ring: int = Field(default=0, ge=0)
    """Tokens of one sequence that a call may bring when the cache keeps the window alone; 0: it keeps all."""
    cell: Literal["float32", "bfloat16"] = "float32"
    """How the cache stores a number; bfloat16 is rounded to nearest, ties to even."""

    @model_validator(mode="after")
    def _possible(self) -> CachedAttentionSpec:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads do not divide over {self.kv_heads} key heads")
        if self.rotated % 2 or self.rotated > self.head_dim:
            raise ValueError(f"{self.rotated} of {self.head_dim} dimensions cannot turn in halves")
        if self.ring and self.window is None:
            raise ValueError("a ring keeps a window; this attention sees everything")
        return self

    @property
    def group(self) -> int:
        """Query heads that share one kv head."""
        return self.heads // self.kv_heads

    @property
    def padded(self) -> int:
        """Width of a cached value: a head's, rounded up to vectors of 16."""
        return -(-self.head_dim // 16) * 16

    def keys(self, longest: int) -> int:
        """Keys S that a cache must have room for when no sequence passes `longest` tokens."""
        if self.ring and self.window is not None:
            longest = min(longest, self.window + self.ring - 1)
        return -(-longest // KEYS) * KEYS

    def bytes(self, slots: int, keys: int) -> int:
        """Bytes of the cache of `slots` sequences with room for `keys` each."""
        size = 4 if self.cell == "float32" else 2
        return slots * self.kv_heads * keys * (self.head_dim + self.padded) * size


def refuses(spec: CachedAttentionSpec) -> str | None:
    """Why an attention cannot take the kernel; None when it can."""
    if not spec.causal:
        return "a token that sees later ones cannot be computed from a cache"
    if spec.head_dim % 4:
        return f"heads of {spec.head_dim} are not a multiple of 4"
    return None
