"""GatedAttention: softmax attention whose output, or what its heads take in, passes a gate made of the input.

Shapes: x [B, T, d], heads' values y [B, T, H h], W_g [H, d], [H h, d] or [d, d].
Source: Gated Attention for Large Language Models, arXiv 2505.06708, section 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Unpack

import torch
from torch import Tensor

from effc.compiler.blocks.attention import Attention, AttentionForm
from effc.compiler.blocks.linear import Linear
from effc.compiler.ops_state import repeat
from effc.compiler.step import Step

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value


class GatedAttention(Attention):
    """after_sdpa: W_o (y * sigmoid(W_g x)), with y what the heads take in; after_o: W_o y * sigmoid(W_g x).

    `kind = head`: one gate a head, which its channels share; `element`: one gate a channel.
    """

    def __init__(
        self,
        *,
        kind: Literal["head", "element"] = "head",
        position: Literal["after_sdpa", "after_o"] = "after_sdpa",
        **form: Unpack[AttentionForm],
    ) -> None:
        super().__init__(**form)
        if kind == "head" and position == "after_o":
            raise ValueError("behind W_o there are no heads to gate: kind = element")
        self.kind = kind
        self.position = position
        inner = self.heads * self.head_dim
        gates = self.heads if kind == "head" else inner if position == "after_sdpa" else self.width
        self.gate = Linear(in_features=self.width, out_features=gates, dtype=self.dtype)

    def expand(self, ops: Ops, x: Value) -> Value:
        y = self.expand_mixed(ops, x)
        g = ops("sigmoid", ops.inline("gate", self.gate, x))
        if self.position == "after_o":
            return ops("gate", ops.inline("o", self.o, y), g)
        g = ops("repeat", g, times=self.head_dim) if self.kind == "head" else g
        return ops.inline("o", self.o, ops("gate", y, g))

    def forward(self, x: Tensor, step: Step) -> Tensor:
        y = self.mixed(x, step)
        g = torch.sigmoid(self.gate(x))
        if self.position == "after_o":
            return torch.mul(self.o(y), g)
        out: Tensor = self.o(y * (repeat(g, times=self.head_dim) if self.kind == "head" else g))
        return out
