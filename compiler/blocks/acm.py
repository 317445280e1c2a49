"""ACM: a module as a sum of small learners, of which each token takes as many as its gate says.

Shapes: B sequences, T tokens, n tokens in a row, N learners of hidden width h, i inputs, o outputs, g the
hidden width of the gate. Source: Adaptive Computation Modules, arXiv 2312.10193, section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effc.compiler.blocks.linear import Linear, StackedLinear
from effc.compiler.blocks.mlp import ACTIVATIONS, Activation
from effc.compiler.blocks.unit import Unit, empty
from effc.compiler.ops_adaptive import first_learners, learned

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value


class ACM(Unit):
    """y_k = sum_{j <= k} W2_j act(W1_j x) (+ b where k > 0), k = argmax(gate(x)) in `fewest`..N.

    gate(x) = V2 gelu(V1 x + c1) + c2, a number for each of 0..N learners. `budget` is the share of the
    learners' work that training aimed at: a plan counts so much. In training a module keeps in `told` what
    each token chose [n, N + 1], one-hot with the gradient of a Gumbel softmax of temperature `tau`.
    """

    shift: nn.Parameter | None

    def __init__(
        self,
        *,
        in_features: int,
        out_features: int,
        learners: int,
        hidden: int,
        gate_hidden: int = 16,
        fewest: int = 0,
        budget: float = 1.0,
        tau: float = 0.8,
        bias: bool = False,
        activation: Activation = "gelu",
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        if hidden == 0 or learners == 0 or fewest > learners:
            raise ValueError(f"{learners} learners of width {hidden}, {fewest} or more of them: none is left")
        self.in_features = in_features
        self.out_features = out_features
        self.learners = learners
        self.hidden = hidden
        self.gate_hidden = gate_hidden
        self.fewest = fewest
        self.budget = budget
        self.tau = tau
        self.bias = bias
        self.activation: Activation = activation
        self.dtype = dtype
        self.told: list[Tensor] = []
        self.learners_in = StackedLinear(
            experts=learners, in_features=in_features, out_features=hidden, dtype=dtype
        )
        self.learners_out = StackedLinear(
            experts=learners, in_features=hidden, out_features=out_features, dtype=dtype
        )
        self.choose_in = Linear(in_features=in_features, out_features=gate_hidden, bias=True, dtype=dtype)
        self.choose_out = Linear(in_features=gate_hidden, out_features=learners + 1, bias=True, dtype=dtype)
        self.register_parameter("shift", empty(out_features, dtype=dtype) if bias else None)

    def learner_flops(self) -> int:
        """Of one learner, for one token."""
        return 2 * self.hidden * (self.in_features + self.out_features)

    def flops(self, mean: int) -> int:
        return round(self.budget * self.learners * self.learner_flops())

    def scores(self, x: Tensor) -> Tensor:
        """x [..., i] -> [..., N + 1] in float32 at least; numbers below `fewest` at -inf."""
        z: Tensor = self.choose_out(F.gelu(self.choose_in(x)))
        wide = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
        few = torch.arange(self.learners + 1, device=x.device) < self.fewest
        return wide.masked_fill(few, -torch.inf)

    def sums(self, x: Tensor) -> Tensor:
        """x [n, i] -> y_0 .. y_N [n, N + 1, o]."""
        parts = [torch.zeros(len(x), self.out_features, dtype=x.dtype, device=x.device)]
        for j in range(self.learners):
            part = self.learner(x, j)
            parts.append(part + self.shift if self.shift is not None and j == 0 else part)
        return torch.stack(parts, 1).cumsum(1)

    def learner(self, x: Tensor, number: int) -> Tensor:
        """x [n, i] -> [n, o]"""
        y: Tensor = self.learners_out(ACTIVATIONS[self.activation](self.learners_in(x, number)), number)
        return y

    def expand(self, ops: Ops, x: Value) -> Value:
        inner = ops("activate", ops.inline("choose_in", self.choose_in, x), form="gelu")
        scores = ops.inline("choose_out", self.choose_out, inner)
        count = ops("first_learners", scores, fewest=self.fewest)
        w1, w2 = ops.stacked("learners_in", self.learners_in), ops.stacked("learners_out", self.learners_out)
        shift = ops.weight("shift") if self.shift is not None else None
        return ops("learned", x, count, w1, w2, shift, form=self.activation)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        if x.is_meta:
            return x.new_zeros(*x.shape[:-1], self.out_features)
        if self.training:
            return self._trained(flat).view(*x.shape[:-1], -1)
        count: Tensor = first_learners(self.scores(flat), fewest=self.fewest)
        out = x.new_zeros(len(flat), self.out_features)
        for j in range(int(count.max()) if len(count) else 0):
            rows = (count > j).nonzero()[:, 0]
            part = self.learner(flat[rows], j)
            out[rows] += part + self.shift if self.shift is not None and j == 0 else part
        return out.view(*x.shape[:-1], -1)

    def _trained(self, x: Tensor) -> Tensor:
        """x [n, i] -> [n, o], of a choice that is drawn and told."""
        choice = F.gumbel_softmax(self.scores(x), tau=self.tau, hard=True)
        self.told.append(choice)
        return (self.sums(x) * choice.to(x.dtype).unsqueeze(-1)).sum(1)


def dense(unit: ACM, x: Tensor, count: Tensor) -> Tensor:
    """x [n, i], count [n] -> [n, o]: all learners, those beyond the count at zero."""
    out: Tensor = learned(
        x,
        count,
        unit.learners_in.weight,
        unit.learners_out.weight,
        unit.shift,
        form=unit.activation,
    )
    return out
