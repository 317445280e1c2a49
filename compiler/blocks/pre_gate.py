"""PreGate: a small causal transformer that names the expert of every token before the first layer runs.

Shapes: x [B, T, d] token embeddings, h [B, T, r] its own stream, scores [B, T, E].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effc.compiler.blocks.attention import Attention
from effc.compiler.blocks.carved import EXPERT
from effc.compiler.blocks.linear import Linear
from effc.compiler.blocks.mlp import MLP
from effc.compiler.blocks.norm import Norm
from effc.compiler.blocks.unit import Unit
from effc.compiler.step import Step

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value

ROPE = {"rope_type": "default", "rope_theta": 10000.0}


class PreGate(Unit):
    """h = W x, one layer (attention, then a plain mlp of width r), scores = head(norm(h)); the largest wins.

    x passes through as it is: the stream of the model is not touched, and the choice stands in the step.
    """

    takes_step = True

    def __init__(
        self, *, width: int, inner: int, heads: int, experts: int, eps: float = 1e-6, dtype: str = "float32"
    ) -> None:
        super().__init__()
        if heads == 0 or inner % heads:
            raise ValueError(f"a width of {inner} does not divide into {heads} heads")
        self.width = width
        self.inner = inner
        self.n_heads = heads
        self.experts = experts
        self.eps = eps
        self.dtype = dtype
        self.entry = Linear(in_features=width, out_features=inner, dtype=dtype)
        self.norm1 = Norm(width=inner, eps=eps, dtype=dtype)
        self.attention = Attention(
            width=inner, heads=heads, kv_heads=heads, head_dim=inner // heads, rope=ROPE, dtype=dtype
        )
        self.norm2 = Norm(width=inner, eps=eps, dtype=dtype)
        self.mlp = MLP(width=inner, hidden=inner, gated=False, dtype=dtype)
        self.norm = Norm(width=inner, eps=eps, dtype=dtype)
        self.exit = Linear(in_features=inner, out_features=experts, dtype=dtype)

    def spec(self) -> dict[str, Any]:
        return {
            "type": "PreGate",
            "width": self.width,
            "inner": self.inner,
            "heads": self.n_heads,
            "experts": self.experts,
            "eps": self.eps,
            "dtype": self.dtype,
        }

    def scores(self, x: Tensor, step: Step) -> Tensor:
        """x [B, T, d] -> [B, T, E]"""
        h: Tensor = self.entry(x)
        h = h + self.attention(self.norm1(h), step)
        h = h + self.mlp(self.norm2(h))
        found: Tensor = self.exit(self.norm(h))
        return found

    def expand(self, ops: Ops, x: Value) -> Value:
        h = ops.inline("entry", self.entry, x)
        h = ops("add", h, ops.inline("attention", self.attention, ops.inline("norm1", self.norm1, h)))
        h = ops("add", h, ops.inline("mlp", self.mlp, ops.inline("norm2", self.norm2, h)))
        scores = ops.inline("exit", self.exit, ops.inline("norm", self.norm, h))
        return ops("tell", x, ops.step, ops("largest", scores), side=EXPERT)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        with torch.no_grad():
            step.sides[EXPERT] = self.scores(x, step).argmax(-1)
        return x
