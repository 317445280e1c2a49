"""EmbedSpec: token numbers to vectors, with learned positions and token type 0 where a model has them."""

from __future__ import annotations

from typing import ClassVar

from pydantic import model_validator

from effc.kernels.cpu.stored import Stored
from effc.kernels.kernel import KernelSpec
from effc.kernels.quant_linear.spec import QuantLinearSpec


class EmbedSpec(KernelSpec, frozen=True):
    """x[m] = E[ids[m]] scale + S[0] + P[position[m] + position_offset], float32.

    E is stored as numbers (`table`) or packed as quant_linear has it (`packed`), so that a table that is the
    head's matrix too lies in memory once. `scale` comes rounded to what the model computes in (gemma).
    """

    op: ClassVar[str] = "embed"
    version: ClassVar[int] = 2

    table: Stored | None = "float32"
    packed: QuantLinearSpec | None = None
    scale: float = 1.0
    positions: Stored | None = None
    """How the table of positions [P, D] is stored; None without one."""
    position_offset: int = 0
    types: Stored | None = None
    """How the row of token type 0 [D] is stored; None without one."""

    @model_validator(mode="after")
    def _possible(self) -> EmbedSpec:
        if (self.table is None) == (self.packed is None):
            raise ValueError("a table is either stored as numbers or packed")
        if self.packed is not None and self.packed.paired:
            raise ValueError("rows of two matrices cannot be looked up as one table")
        return self
