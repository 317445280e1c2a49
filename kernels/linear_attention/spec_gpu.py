"""LinearAttentionGpuSpec: the recurrence in chunks of 64 tokens and by steps, on a GPU."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import model_validator

from effc.kernels.linear_attention.spec import RecurrenceSpec

CHUNK = 64
"""Tokens that meet in matrix products; between chunks there is a state."""
LEVELS = 6
"""Each pair of tokens of a chunk is of two neighboring blocks of 2^n tokens, for one n below this."""
BLOCK = 64
"""Channels of keys and of values of a program that carries a part of a state."""
FLOOR = -100.0
"""The lowest base-2 logarithm that a gate counts with: what it keeps, 8e-31 of the state, no sum shows."""


class LinearAttentionGpuSpec(RecurrenceSpec, frozen=True):
    """q, k, v and o bfloat16, log gates and states float32, over packed sequences, forward and backward.

    With a gate for each channel, tokens of a chunk meet in six products: of neighboring blocks of 1, 2, 4 ..
    32 tokens, one side decayed from the edge between them, the other to it. So no factor exceeds 1, and one
    number a token and channel is enough at each size. What multiplies in a product is rounded to bfloat16,
    states between chunks too; the state that is carried on and all sums are float32.
    """

    op: ClassVar[str] = "linear_attention_gpu"
    version: ClassVar[int] = 1

    key_dim: Literal[64, 128, 256]
    value_dim: Literal[64, 128, 256]
    keys: Literal[32, 64]
    """Channels of keys in a step of a sum over them, a field of its order; 32 where each has its gate, as
    more do not fit the registers."""
    values: Literal[64, 128]
    """Channels of values of a program that adds up outputs."""

    @model_validator(mode="before")
    @classmethod
    def _fitting(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        keys = 64 if given.get("gate") == "head" else 32
        return {"keys": keys, "values": 64 if given.get("value_dim") == 64 else 128} | given

    @model_validator(mode="after")
    def _possible(self) -> LinearAttentionGpuSpec:
        if self.value_dim % self.values:
            raise ValueError(f"programs of {self.values} of {self.value_dim} channels of values")
        if self.gate == "key" and self.keys != 32:
            raise ValueError("steps of 64 channels that each have a gate spill registers, take 32")
        return self

    def operations(self, tokens: int) -> int:
        """Multiplications and additions of the forward pass that the chunk form needs, masks not counted."""
        k, v = self.key_dim, self.value_dim
        each = self.heads * (2 * k * v + CHUNK * (k + v)) + self.kv_heads * 2 * k * v
        return tokens * each

    def bytes(self, tokens: int) -> int:
        """Read and written by the forward pass, each tensor once, states between chunks included."""
        k, v, h, hk = self.key_dim, self.value_dim, self.heads, self.kv_heads
        each = 2 * h * (k + v) + 2 * hk * (k + v) + 4 * hk * self.gates
        return tokens * each + tokens // CHUNK * 4 * hk * k * v


def refuses(spec: LinearAttentionGpuSpec, tokens: int, over: str = "key") -> str | None:
    """Why a recurrence over `tokens` in all cannot take the kernels; None when it can."""
    if over != "key":
        return f"gates over {over}s, the kernels have those over keys"
    if tokens * spec.heads * max(spec.key_dim, spec.value_dim) >= 2**31:
        return f"{tokens} tokens of {spec.heads} heads need offsets beyond 31 bits"
    return None
