"""RecurrentSpec (C): a gated linear recurrence over rows of any mix of sequences, and what rows are made of.

Symbols: H query heads, Hk key heads, G = H / Hk, K and V channels of keys and values in a head, M rows.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from effc.kernels.kernel import KernelSpec


class RecurrentSpec(KernelSpec, frozen=True):
    """S_t = diag(a_t) S_{t-1} + k_t^T v_t, o_t = scale q_t S_t (a over columns where `over` is value).

    All float32. a = exp(g), g = logsigmoid(pool(x)) / divisor. What is let in, 1 - a, may stand for k or for
    v. A state is empty at position 0 of its sequence. Rows of a sequence go one after the other, so a prompt
    in one call and one token a call are the same sums.
    """

    op: ClassVar[str] = "linear_attention"
    version: ClassVar[int] = 1

    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    key_dim: int = Field(gt=0, le=1024)
    value_dim: int = Field(gt=0)
    over: Literal["key", "value"] = "key"
    """Which side of the state the gates belong to."""
    shared: bool = False
    """One gate for all channels of a head."""
    scale: float = 1.0
    divisor: float = Field(gt=0)
    pool: int = Field(default=1, gt=0)
    """Neighboring numbers of x whose mean is a gate's."""
    q: Literal["plain", "softmax"] = "plain"
    k: Literal["plain", "softmax", "entry"] = "plain"
    """entry: 1 - a"""
    v: Literal["plain", "entry"] = "plain"
    norm: float = Field(default=0.0, ge=0)
    """eps of RMS norms over each head of q and k before anything else; 0: none"""
    norm_offset: float = 0.0
    residual: bool = False
    """The result is added to what is there."""

    @model_validator(mode="after")
    def _possible(self) -> RecurrentSpec:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads do not divide over {self.kv_heads} key heads")
        side = {"k": ("key", self.k), "v": ("value", self.v)}
        for name, (over, kind) in side.items():
            if kind == "entry" and (self.shared or self.over != over):
                raise ValueError(f"1 - a has no channel for each of {name}'s")
        return self

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.heads // self.kv_heads

    @property
    def gates(self) -> int:
        """Gates of a row and key head."""
        if self.shared:
            return 1
        return self.key_dim if self.over == "key" else self.value_dim

    @property
    def blocks(self) -> int:
        """Vectors of 16 values in a head."""
        return -(-self.value_dim // 16)

    @property
    def state(self) -> int:
        """Numbers in the state of one sequence: [Hk, blocks, K, 16]."""
        return self.kv_heads * self.blocks * self.key_dim * 16

    def bytes(self, slots: int) -> int:
        """Bytes of the states of `slots` sequences, which each token reads and writes one of."""
        return 4 * slots * self.state


def refuses(spec: RecurrentSpec) -> str | None:
    """Why a recurrence cannot take the kernel; None when it can."""
    if spec.group > 16:
        return f"{spec.group} query heads share a key head; their sums fit registers up to 16"
    return None
