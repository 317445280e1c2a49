"""GatedLinearAttention: attention without softmax, whose past is one matrix a head that forgets by the token.

Shapes: x [B, T, d], q, k [B, H, T, K], v [B, H, T, V], state [B, H, K, V]; H heads, K and V channels of each.
Source: Gated Linear Attention Transformers with Hardware-Efficient Training, arXiv 2312.06635, section 4.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch.nn.functional as F
from torch import Tensor

from effc.compiler.blocks.linear import Linear
from effc.compiler.blocks.norm import Norm
from effc.compiler.blocks.unit import DTYPES, Unit
from effc.compiler.ops_state import forget, kept, log_gate, scan
from effc.compiler.scan import CHUNK, SUB
from effc.compiler.step import Step

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value

OutGate = Literal["swish", "none"]


class GatedLinearAttention(Unit):
    """S_t = diag(a_t) S_{t-1} + k_t^T v_t, y = W_o (norm(q_t S_t / sqrt(K)) * swish(W_g x)).

    a_t = sigmoid(W_up W_down x + c)^(1 / gate_div), one number a channel of the keys, or one a head where
    `gating = scalar`. The norm is over each head. There are no positions: gates tell near from far.
    """

    takes_step = True

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        gate_rank: int = 16,
        gate_div: float = 16.0,
        gating: Literal["vector", "scalar"] = "vector",
        out_gate: OutGate = "swish",
        chunk: int = CHUNK,
        sub: int = SUB,
        eps: float = 1e-5,
        dtype: str = "float32",
    ) -> None:
        """`key_dim`, `value_dim`: K and V of one head; `gate_rank`: inner width of the gate's projection."""
        super().__init__()
        if 0 in (width, heads, key_dim, value_dim, gate_rank):
            raise ValueError(f"width {width}, {heads} heads of {key_dim} and {value_dim}: none may be 0")
        if not gate_div > 0:
            raise ValueError(f"gate_div must be above 0, not {gate_div}")
        if sub < 1 or chunk < 1 or chunk % sub:
            raise ValueError(f"chunk is a multiple of sub, not {chunk} of {sub}")
        self.width = width
        self.heads = heads
        self.key_dim = key_dim
        self.value_dim = value_dim
        self.gate_rank = gate_rank
        self.gate_div = gate_div
        self.gating = gating
        self.out_gate = out_gate
        self.chunk = chunk
        self.sub = sub
        self.eps = eps
        self.dtype = dtype
        keys, values = heads * key_dim, heads * value_dim
        gates = keys if gating == "vector" else heads
        self.q = Linear(in_features=width, out_features=keys, dtype=dtype)
        self.k = Linear(in_features=width, out_features=keys, dtype=dtype)
        self.v = Linear(in_features=width, out_features=values, dtype=dtype)
        self.forget_down = Linear(in_features=width, out_features=gate_rank, dtype=dtype)
        self.forget_up = Linear(in_features=gate_rank, out_features=gates, bias=True, dtype=dtype)
        self.norm = Norm(width=value_dim, eps=eps, dtype=dtype)
        if out_gate != "none":
            self.gate = Linear(in_features=width, out_features=values, dtype=dtype)
        self.o = Linear(in_features=values, out_features=width, dtype=dtype)

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.key_dim)

    def flops(self, mean: int) -> int:
        """Of the chunk form: half a chunk is met token by token, the rest through the state."""
        k, v = self.key_dim, self.value_dim
        return self.heads * (self.chunk * (k + v) + 4 * k * v)

    def state_bytes(self) -> int:
        wide: int = max(4, DTYPES[self.dtype].itemsize)
        return self.heads * self.key_dim * self.value_dim * wide

    def expand(self, ops: Ops, x: Value) -> Value:
        def split(name: str, unit: Linear, x: Value) -> Value:
            return ops("heads_first", ops("heads", ops.inline(name, unit, x), count=self.heads))

        q, k, v = (split(n, u, x) for n, u in (("q", self.q), ("k", self.k), ("v", self.v)))
        low = ops.inline("forget_down", self.forget_down, x)
        g = ops("log_gate", split("forget_up", self.forget_up, low), divisor=self.gate_div)
        form = {"over": "key", "scale": self.scale, "chunk": self.chunk, "sub": self.sub}
        k, g = ops("kept", k, ops.step), ops("forget", g, ops.step)
        y, state = ops.many("scan", q, k, v, g, ops.past, **form)
        ops.graph.state = state.number
        y = ops("join_heads", ops.inline("norm", self.norm, y))
        if self.out_gate != "none":
            y = ops("gate", y, ops("activate", ops.inline("gate", self.gate, x), form="silu"))
        return ops.inline("o", self.o, y)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        batch, length = x.shape[:2]

        def split(x: Tensor) -> Tensor:
            return x.view(batch, length, self.heads, -1).transpose(1, 2)

        q, k, v = split(self.q(x)), kept(split(self.k(x)), step), split(self.v(x))
        g = log_gate(split(self.forget_up(self.forget_down(x))), divisor=self.gate_div)
        past = step.cache.state(self) if step.cache is not None else None
        y, state = scan(
            q,
            k,
            v,
            forget(g, step),
            past[0] if past is not None else None,
            over="key",
            scale=self.scale,
            chunk=self.chunk,
            sub=self.sub,
        )
        if step.cache is not None:
            step.cache.keep(self, state)
        y = self.norm(y).transpose(1, 2).reshape(batch, length, -1)
        if self.out_gate != "none":
            y = y * F.silu(self.gate(x))
        out: Tensor = self.o(y)
        return out
