"""Jobs: what a model asks of a processor, one step above kernels. Values are buffers of float32 rows.

Rows are tokens: a call has M rows of any mix of sequences, so prefill, decoding and batches are one program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from effc.compiler.roles import layer_of


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
    planes: tuple[int, int, int, int] | None = None
    """(planes, runs of rows, runs of columns, powers of two in a scale or 0 for half precision) of signs"""
    dtype: str = "float32"
    experts: int = 0
    """Of a stack of matrices, one above the other in the tensor; 0: it is one matrix."""
    parts: int = 0
    """Of a dense matrix that is stored as blocks on its diagonal, how many; 0: it is stored whole."""
    factor: float = 1.0
    """What a dense matrix is multiplied by when the program is loaded."""
    low: tuple[Matrix, Matrix] | None = None
    """Of a packed one, factors A [r, columns] and B [rows, r] of what is added to it, W + B A, on a GPU."""

    @property
    def unit(self) -> str:
        """Path of the unit that holds the tensor."""
        return self.tensor.rpartition(".")[0]

    @property
    def kind(self) -> tuple[Any, ...]:
        """What two matrices must share to become one."""
        dtype = self.dtype if self.quantized is None else ""
        form = (self.quantized, self.planes, dtype, self.experts, self.parts, self.factor)
        return (self.columns, self.bias is None, *form)


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

    weight: str | None = field(kw_only=True)
    """None: a gain of one."""
    bias: str | None = None
    form: str = "rms"
    eps: float = 1e-6
    offset: float = 0.0
    parts: int = 1
    """Equal parts of a row (heads) that are normalized each on its own."""


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
class Route(Job):
    """Reads scores, writes weights [k] and numbers of experts [k]; of the form `largest` the number alone."""

    form: Literal["best", "above", "largest"] = field(kw_only=True)
    experts: int = field(kw_only=True)
    active: int = field(kw_only=True)
    renormalize: bool = True
    act: str = "none"
    tau: float = 1.0
    least: float = 0.0


@dataclass(slots=True, eq=False)
class Experts(Linear):
    """A stack of matrices, each on the rows that chose it: reads x and the choice [k] of each row.

    What it writes stands by expert, k rows for each of x's; so does x itself when it is another's result.
    """

    active: int = field(kw_only=True)
    placed: bool = False
    """Whether x stands by expert already."""


@dataclass(slots=True, eq=False)
class Combine(Job):
    """What experts gave, back in the order of rows: reads it, the choice, and weights where there are any.

    A residual is read last.
    """

    active: int = field(kw_only=True)
    weighted: bool = field(kw_only=True)
    residual: bool = False


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
class Scan(Job):
    """A gated recurrence: reads q, what gates are made of, k and v unless 1 - a stands for them.

    A residual is read last.
    """

    heads: int = field(kw_only=True)
    kv_heads: int = field(kw_only=True)
    key_dim: int = field(kw_only=True)
    value_dim: int = field(kw_only=True)
    form: dict[str, Any] = field(kw_only=True)
    """Further fields of RecurrentSpec."""
    q_norm: Normalize | None = None
    k_norm: Normalize | None = None
    residual: bool = False
    offsets: tuple[int, ...] = (0, 0, 0, 0)
    """Where in its row each of q, gates, k and v begins."""


@dataclass(slots=True, eq=False)
class Arithmetic(Job):
    """add, gate (a * b), scale, softcap, sigmoid, times (a weight of one number), or an activation."""

    name: str = field(kw_only=True)
    number: float = 0.0
    each: int = 1
    """Of gate: neighboring numbers of a row that share one of the second value."""
    tensor: str | None = None
    """Of times: the weight."""


@dataclass(slots=True, eq=False)
class Cell(Job):
    """A recurrent cell with diagonal weights: reads the inputs of its three gates."""

    form: Literal["gru", "lstm_cifg"] = field(kw_only=True)
    tensor: str = field(kw_only=True)


@dataclass(slots=True)
class Jobs:
    """All jobs of a model in order; `width` of each value in numbers a row."""

    jobs: list[Job]
    widths: dict[int, int]
    output: int

    def layers(self) -> list[int | None]:
        """The layer of every job; plain arithmetic between blocks belongs to the layer of what it reads."""
        of_value: dict[int, int | None] = {}
        found: list[int | None] = []
        for job in self.jobs:
            read = [layer for n in job.reads if (layer := of_value.get(n)) is not None]
            found.append(layer_of(job.paths[0]) if job.paths else max(read, default=None))
            of_value |= dict.fromkeys(job.writes, found[-1])
        return found


class Unlowered(Exception):
    """The model has something that no job stands for; the words say what and where."""
