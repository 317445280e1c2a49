"""Exit: a head between two layers, and a gate that says which tokens leave there with its answer.

Shapes: B sequences, T tokens, d width, V classes. Source: arXiv 2310.09163, section 4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor

from effc.compiler.blocks.linear import Linear
from effc.compiler.blocks.norm import Norm
from effc.compiler.blocks.unit import Unit
from effc.compiler.ops_adaptive import (
    ANSWERS,
    confidence,
    exit_answer,
    exit_leave,
    leaving,
    settle,
    there,
    wide_linear,
)
from effc.compiler.step import Step

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value


GAIN = 16.0
"""What a gate's five numbers count for: they must move as fast as the head's many, by steps of one size."""


class Exit(Unit):
    """z = head(norm(x)), g = sigmoid(GAIN gate(confidence(z))); who leaves keeps z and its stream as it is.

    x passes through. A token leaves where the chance to do so, given that it is still there, reaches
    `threshold`: min(g, rest) / rest with rest = 1 - the gates before. In training nobody leaves. `number`:
    which of the exits it is; `power` sharpens the last feature of `confidence`.
    """

    takes_step = True

    def __init__(
        self,
        *,
        width: int,
        classes: int,
        number: int,
        threshold: float = 0.5,
        power: float = 2.0,
        eps: float = 1e-6,
        form: Literal["rms", "layer"] = "rms",
        norm_bias: bool = False,
        offset: float = 0.0,
        bias: bool = False,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"{classes} classes leave nothing to be sure of")
        self.width = width
        self.classes = classes
        self.number = number
        self.threshold = threshold
        self.power = power
        self.eps = eps
        self.form: Literal["rms", "layer"] = form
        self.norm_bias = norm_bias
        self.offset = offset
        self.bias = bias
        self.dtype = dtype
        self.norm = Norm(width=width, eps=eps, form=form, bias=norm_bias, offset=offset, dtype=dtype)
        self.head = Linear(in_features=width, out_features=classes, bias=bias, dtype=dtype)
        self.gate = Linear(in_features=4, out_features=1, bias=True, dtype=dtype)

    def flops(self, mean: int) -> int:
        """The features: two softmaxes with their entropies over the classes."""
        return 12 * self.classes

    def logits(self, x: Tensor) -> Tensor:
        """x [..., d] -> [..., V]"""
        z: Tensor = self.head(self.norm(x))
        return z

    def gates(self, z: Tensor) -> Tensor:
        """logits [..., V] -> g [...], float32 at least."""
        seen = confidence(z, power=self.power)
        told = wide_linear(seen, self.gate.weight, cast(Tensor, self.gate.bias))
        return torch.sigmoid(told * GAIN).squeeze(-1)

    def expand(self, ops: Ops, x: Value) -> Value:
        z = ops.inline("head", self.head, ops.inline("norm", self.norm, x))
        seen = ops("confidence", z, power=self.power)
        told = ops("wide_linear", seen, ops.weight("gate.weight"), ops.weight("gate.bias"))
        gate = ops("sigmoid", ops("scale", told, factor=GAIN))
        return ops("exit_leave", x, ops.step, gate, z, number=self.number, threshold=self.threshold)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        if x.is_meta or self.training:
            return x
        come = there(step, x, self.number)
        if bool(come.all()):
            z = self.logits(x)
            gate = self.gates(z).unsqueeze(-1)
            exit_leave(x, step, gate, z, number=self.number, threshold=self.threshold)
        elif bool(come.any()):
            self._of_some(x, step, come)
        return x

    def _of_some(self, x: Tensor, step: Step, come: Tensor) -> None:
        """The exit of the tokens that come to it [B, T]; only they are computed."""
        z = self.logits(x[come])
        some = self.gates(z)
        gate = some.new_zeros(come.shape)
        gate[come] = some
        goes = leaving(step, gate, self.number, self.threshold)
        settle(step, goes, self.number)
        if bool(goes.any()):
            answers = step.sides[ANSWERS].clone()
            answers[goes] = z[goes[come]]
            step.sides[ANSWERS] = answers


class Answers(Unit):
    """Behind the head: the logits of tokens that left are those they left with."""

    takes_step = True

    def __init__(self) -> None:
        super().__init__()

    def expand(self, ops: Ops, x: Value) -> Value:
        return ops("exit_answer", x, ops.step)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        out: Tensor = exit_answer(x, step)
        return out
