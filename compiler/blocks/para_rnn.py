"""ParaRNN: a gated recurrent cell in attention's place, run over a whole sequence at once by Newton's method.

Shapes: x [B, T, d], inputs of G gates [B, T, G, d], diagonal weights [P, d], states [B, T, S, d].
Source: ParaRNN, arXiv 2510.21450.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from effc.compiler.blocks.linear import Linear
from effc.compiler.blocks.unit import DTYPES, Unit, empty
from effc.compiler.newton import GATES, PEEPS, STATES, Cell, Jac
from effc.compiler.ops_state import head_linear, recur
from effc.compiler.step import Step

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value


class HeadLinear(Unit):
    """y = x W^T + b where each of `heads` parts of x goes through a matrix of its own: W [heads, o / heads,
    i / heads].
    """

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, *, heads: int, in_features: int, out_features: int, dtype: str = "float32") -> None:
        super().__init__()
        if heads == 0 or in_features % heads or out_features % heads:
            raise ValueError(f"{in_features} and {out_features} channels do not divide over {heads} heads")
        self.heads = heads
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.weight = empty(heads, out_features // heads, in_features // heads, dtype=dtype)
        self.bias = empty(out_features, dtype=dtype)

    def flops(self, mean: int) -> int:
        return 2 * self.in_features * self.out_features // self.heads

    def expand(self, ops: Ops, x: Value) -> Value:
        return ops("head_linear", x, ops.weight("weight"), ops.weight("bias"))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = head_linear(x, self.weight, self.bias)
        return y


class ParaRNN(Unit):
    """y = W_o h, h the state of a GRU or LSTM (CIFG) cell whose recurrent weights are diagonal.

    The cells, J and the solution of all tokens together: compiler/newton.py.
    """

    takes_step = True

    def __init__(
        self,
        *,
        width: int,
        cell: Cell = "gru",
        heads: int = 2,
        jac: Jac = "diag",
        iters: int = 3,
        omega: float = 1.0,
        tol: float = 1e-4,
        dtype: str = "float32",
    ) -> None:
        """`heads`: parts of x that do not meet in the gates; `iters`, `omega`, `tol`: of Newton's method."""
        super().__init__()
        if width == 0 or not omega > 0 or not tol > 0:
            raise ValueError(f"width {width}, omega {omega} and tol {tol} must be above 0")
        if cell == "gru" and jac == "block2":
            raise ValueError("a gru has one state a channel, so its J is diagonal")
        self.width = width
        self.cell = cell
        self.heads = heads
        self.jac = jac
        self.iters = iters
        self.omega = omega
        self.tol = tol
        self.dtype = dtype
        names = ("z", "r", "c") if cell == "gru" else ("f", "c", "u")
        assert len(names) == GATES[cell]
        for name in names:
            setattr(
                self,
                f"gate_{name}",
                HeadLinear(heads=heads, in_features=width, out_features=width, dtype=dtype),
            )
        self.names = names
        self.peep = Peephole(count=PEEPS[cell], width=width, dtype=dtype)
        self.o = Linear(in_features=width, out_features=width, dtype=dtype)

    def flops(self, mean: int) -> int:
        """Of the cell as it decodes: about a dozen operations a channel and gate, once."""
        return 4 * (GATES[self.cell] + PEEPS[self.cell]) * self.width

    def state_bytes(self) -> int:
        wide: int = max(4, DTYPES[self.dtype].itemsize)
        return STATES[self.cell] * self.width * wide

    def expand(self, ops: Ops, x: Value) -> Value:
        gates = [ops.inline(f"gate_{n}", getattr(self, f"gate_{n}"), x) for n in self.names]
        peep = ops.inline("peep", self.peep, x)
        more = {"cell": self.cell, "jac": self.jac, "iters": self.iters, "omega": self.omega, "tol": self.tol}
        h, state = ops.many("recur", *gates, peep, ops.step, ops.past, **more)
        ops.graph.state = state.number
        return ops.inline("o", self.o, h)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        gates = [getattr(self, f"gate_{n}")(x) for n in self.names]
        past = step.cache.state(self) if step.cache is not None else None
        h, state = recur(
            *gates,
            self.peep(),
            step,
            past[0] if past is not None else None,
            cell=self.cell,
            jac=self.jac,
            iters=self.iters,
            omega=self.omega,
            tol=self.tol,
        )
        if step.cache is not None:
            step.cache.keep(self, state)
        out: Tensor = self.o(h)
        return out


class Peephole(Unit):
    """Diagonal recurrent weights [count, width] of a cell."""

    weight: nn.Parameter

    def __init__(self, *, count: int, width: int, dtype: str = "float32") -> None:
        super().__init__()
        self.count = count
        self.width = width
        self.dtype = dtype
        self.weight = empty(count, width, dtype=dtype)

    def expand(self, ops: Ops, x: Value) -> Value:
        """The numbers alone; x is not read."""
        return ops.weight("weight")

    def forward(self) -> Tensor:
        return self.weight
