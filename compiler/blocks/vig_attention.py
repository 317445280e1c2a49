"""VigAttention: linear attention over the patches of an image, from the first to the last and back.

Shapes: x [B, 1 + P, d], a class token and P = side^2 patches; q, k [B, H, 1 + P, K], v [B, H, 1 + P, V], H
V = d.
Source: ViG, arXiv 2405.18425.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effc.compiler.blocks.linear import Linear
from effc.compiler.blocks.norm import Norm
from effc.compiler.blocks.unit import Unit, empty
from effc.compiler.ops_state import backwards, behind, depthwise, first_token, log_gate, scan
from effc.compiler.scan import CHUNK, SUB
from effc.compiler.step import Step

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value


class Depthwise(Unit):
    """Each channel of an image of side x side patches through a kernel of its own; x [B, side side, d]."""

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, *, width: int, side: int, kernel: int = 3, dtype: str = "float32") -> None:
        super().__init__()
        if 0 in (width, side) or kernel % 2 == 0:
            raise ValueError(f"width {width} and side {side} must be above 0, kernel {kernel} odd")
        self.width = width
        self.side = side
        self.kernel = kernel
        self.dtype = dtype
        self.weight = empty(width, 1, kernel, kernel, dtype=dtype)
        self.bias = empty(width, dtype=dtype)

    def flops(self, mean: int) -> int:
        return 2 * self.width * self.kernel**2

    def expand(self, ops: Ops, x: Value) -> Value:
        return ops("depthwise", x, ops.weight("weight"), ops.weight("bias"), side=self.side)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = depthwise(x, self.weight, self.bias, side=self.side)
        return y


class VigAttention(Unit):
    """y = W_o (g * norm(o) + (1 - g) * norm(l)), l = silu(conv(x)), o = (forward scan + backward scan) / 2.

    Both scans read the same q, k, v of l, each with gates of its own; g = sigmoid(W_g x). The class token
    passes the convolution by. Without `inject`, y = W_o (g * norm(o)).
    """

    takes_step = True

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        key_dim: int,
        side: int,
        gate_rank: int = 16,
        gate_div: float = 16.0,
        kernel: int = 3,
        inject: bool = True,
        chunk: int = CHUNK,
        sub: int = SUB,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        if 0 in (width, heads, key_dim, gate_rank) or width % heads:
            raise ValueError(f"width {width} does not divide over {heads} heads, or a size is 0")
        if not gate_div > 0:
            raise ValueError(f"gate_div must be above 0, not {gate_div}")
        if sub < 1 or chunk < 1 or chunk % sub:
            raise ValueError(f"chunk is a multiple of sub, not {chunk} of {sub}")
        self.width = width
        self.heads = heads
        self.key_dim = key_dim
        self.side = side
        self.gate_rank = gate_rank
        self.gate_div = gate_div
        self.kernel = kernel
        self.inject = inject
        self.chunk = chunk
        self.sub = sub
        self.dtype = dtype
        keys = heads * key_dim
        self.local = Depthwise(width=width, side=side, kernel=kernel, dtype=dtype)
        self.q = Linear(in_features=width, out_features=keys, dtype=dtype)
        self.k = Linear(in_features=width, out_features=keys, dtype=dtype)
        self.v = Linear(in_features=width, out_features=width, dtype=dtype)
        self.forget_down = Linear(in_features=width, out_features=gate_rank, dtype=dtype)
        self.forget_up = Linear(in_features=gate_rank, out_features=2 * keys, bias=True, dtype=dtype)
        self.gate = Linear(in_features=width, out_features=width, dtype=dtype)
        self.norm = Norm(width=width, eps=1e-5, dtype=dtype)
        if inject:
            self.local_norm = Norm(width=width, eps=1e-5, dtype=dtype)
        self.o = Linear(in_features=width, out_features=width, dtype=dtype)

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.key_dim)

    def flops(self, mean: int) -> int:
        """Of two scans in the chunk form"""
        k, v = self.key_dim, self.width // self.heads
        return 2 * self.heads * (self.chunk * (k + v) + 4 * k * v)

    def expand(self, ops: Ops, x: Value) -> Value:
        def split(x: Value, count: int) -> Value:
            return ops("heads_first", ops("heads", x, count=count))

        first, rest = ops.many("first_token", x)
        near = ops("activate", ops.inline("local", self.local, rest), form="silu")
        tokens = ops("behind", first, near)
        q, k, v = (split(ops.inline(n, getattr(self, n), tokens), self.heads) for n in ("q", "k", "v"))
        low = ops.inline("forget_down", self.forget_down, tokens)
        both = ops("log_gate", ops.inline("forget_up", self.forget_up, low), divisor=self.gate_div)
        there, back = ops.many("halves", split(both, 2 * self.heads))
        more = {"over": "key", "scale": self.scale, "chunk": self.chunk, "sub": self.sub}
        one, _ = ops.many("scan", q, k, v, there, None, **more)
        turned = (ops("backwards", t) for t in (q, k, v, back))
        two, _ = ops.many("scan", *turned, None, **more)
        o = ops("join_heads", ops("scale", ops("add", one, ops("backwards", two)), factor=0.5))
        y = ops.inline("norm", self.norm, o)
        g = ops("sigmoid", ops.inline("gate", self.gate, x))
        if not self.inject:
            return ops.inline("o", self.o, ops("gate", y, g))
        beside = ops.inline("local_norm", self.local_norm, tokens)
        apart = ops("add", y, ops("scale", beside, factor=-1.0))
        return ops.inline("o", self.o, ops("add", beside, ops("gate", apart, g)))

    def forward(self, x: Tensor, step: Step) -> Tensor:
        batch, length = x.shape[:2]

        def split(t: Tensor, count: int) -> Tensor:
            return t.view(batch, length, count, -1).transpose(1, 2)

        first, rest = first_token(x)
        tokens = behind(first, F.silu(self.local(rest)))
        q, k, v = (split(linear(tokens), self.heads) for linear in (self.q, self.k, self.v))
        both = log_gate(self.forget_up(self.forget_down(tokens)), divisor=self.gate_div)
        there, back = split(both, 2 * self.heads).chunk(2, 1)
        more = {"over": "key", "scale": self.scale, "chunk": self.chunk, "sub": self.sub}
        one, _ = scan(q, k, v, there, None, **more)
        two, _ = scan(*(backwards(t) for t in (q, k, v, back)), None, **more)
        o = (one + backwards(two)) * 0.5
        y: Tensor = self.norm(o.transpose(1, 2).reshape(batch, length, self.width))
        g = torch.sigmoid(self.gate(x))
        if self.inject:
            beside: Tensor = self.local_norm(tokens)
            mixed = beside + (y - beside) * g
        else:
            mixed = y * g
        out: Tensor = self.o(mixed)
        return out
