"""RecurrenceSpec: what every kernel of a gated linear recurrence is told, on any device."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from effc.kernels.kernel import KernelSpec

Gate = Literal["key", "head"]
"""One log gate for each channel of a key (GLA), or one for each key head (retention, Mamba-2)."""


class RecurrenceSpec(KernelSpec, frozen=True):
    """S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t, o_t = scale q_t S_t, with g_t <= 0 and S in float32.

    q has `heads` heads of `key_dim` channels; k, v, g and S have `kv_heads`, each shared by neighbors in q.
    """

    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    key_dim: int = Field(gt=0)
    value_dim: int = Field(gt=0)
    gate: Gate = "key"
    scale: float = Field(gt=0)

    @model_validator(mode="after")
    def _divides(self) -> RecurrenceSpec:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads do not divide over {self.kv_heads} key heads")
        return self

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.heads // self.kv_heads

    @property
    def gates(self) -> int:
        """Log gates of a token and key head."""
        return self.key_dim if self.gate == "key" else 1

    @property
    def state(self) -> int:
        """Bytes of the state of one sequence."""
        return 4 * self.kv_heads * self.key_dim * self.value_dim
