"""Jobs: what a model asks of a processor, one step above kernels. Values are buffers of float32 rows.

Rows are tokens: a call has M rows of any mix of sequences, so prefill, decoding and batches are one program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Matrix:
    """The weights of one linear map: a unit of the model, or a plain tensor of it."""

    tensor: str
    """Canonical name of the dense tensor, or of the packed one."""
    rows: int
    columns: int
    bias: str | None = None
    quantized: tuple[int, int, bool, str] | None = None
    """(bits, group or 0 for a whole row, symmetric, dtype of the scales) of packed weights"""
    dtype: str = "float32"

    @property
    def unit(self) -> str:
        """Path of the unit that holds the tensor."""
        return self.tensor.rpartition(".")[0]

    @property
    def kind(self) -> tuple[Any, ...]:
        """What two matrices must share to become one."""
        return (self.columns, self.quantized, self.dtype if self.quantized is None else "", self.bias is None)


@dataclass(slots=True, eq=False)
class Job:
    """One piece of work. Reads and writes are numbers of values in the flat op list."""

    reads: list[int]
    writes: list[int]
    paths: list[str] = field(default_factory=list)
    """Units of the model that it does the work of."""


@dataclass(slots=True, eq=False)
class Embed(Job):
    """Rows of a table, scaled, with a row for the position and the first token type added."""

    table: Matrix = field(kw_only=True)
    scale: float = 1.0
    positions: tuple[str, int] | None = None
    """(tensor, offset)"""
    types: str | None = None


@dataclass(slots=True, eq=False)
class Normalize(Job):
    """RMS or layer norm over each row."""

    weight: str = field(kw_only=True)
    bias: str | None = None
    form: str = "rms"
    eps: float = 1e-6
    offset: float = 0.0


@dataclass(slots=True, eq=False)
class Linear(Job):
    """One matrix, several that share x and are laid side by side, or a pair: activation(first) * second.

    The residual, where there is one, is the last value read.
    """

    matrices: list[Matrix] = field(kw_only=True)
    epilogue: tuple[str, ...] = ()
    paired: bool = False

    @property
    def width(self) -> int:
        """Numbers in a row of the result."""
        total = sum(m.rows for m in self.matrices)
        return total // 2 if self.paired else total


@dataclass(slots=True, eq=False)
class Attend(Job):
    """Causal attention over the cache: reads q, k, v, each a value and where in its row it begins."""

    heads: int = field(kw_only=True)
    kv_heads: int = field(kw_only=True)
    head_dim: int = field(kw_only=True)
    scale: float = field(kw_only=True)
    cap: float | None = None
    window: int | None = None
    rope: Mapping[str, Any] | None = None
    q_norm: Normalize | None = None
    k_norm: Normalize | None = None
    offsets: tuple[int, int, int] = (0, 0, 0)


@dataclass(slots=True, eq=False)
class Arithmetic(Job):
    """add, gate (a * b), scale, softcap, or an activation by name."""

    name: str = field(kw_only=True)
    number: float = 0.0


@dataclass(slots=True)
class Jobs:
    """All jobs of a model in order; `width` of each value in numbers a row."""

    jobs: list[Job]
    widths: dict[int, int]
    output: int
    layer_of: dict[str, int | None] = field(default_factory=dict)


class Unlowered(Exception):
    """The model has something that no job stands for; the words say what and where."""
