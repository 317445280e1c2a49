"""DepthAttention: attention of those tokens of a batch that run a loop, over those that ran it before.

Shapes: x [1, N, d], the tokens of all rows one after another; q [N, H, h], k and v [N, Hk, h].
Source: Mixture-of-Recursions, arXiv 2507.10524, section 2.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from effc.compiler.blocks.linear import Linear
from effc.compiler.blocks.norm import Norm
from effc.compiler.blocks.rope import checked
from effc.compiler.blocks.unit import DTYPES, Unit
from effc.compiler.step import Step
from effc.compiler.tokens import Among, Past, Source

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value


class DepthAttention(Unit):
    """Attention whose tokens stand where they stood in their row: positions, windows and order are theirs.

    kv = own: keys and values of tokens that run this loop, which alone are cached; tell: the same, handed on
    to the layer's later loops; hear: those of the first loop, so that nothing is projected or cached here.
    """

    takes_step = True

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        loop: int,
        slot: int,
        share: float = 1.0,
        kv: Source = "own",
        bias: bool = False,
        bias_o: bool = False,
        rope: Mapping[str, Any] | None = None,
        qk_norm: float = 0.0,
        window: int | None = None,
        cap: float | None = None,
        scale: float | None = None,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        if 0 in (width, heads, kv_heads, head_dim) or heads % kv_heads:
            raise ValueError(f"{heads} query heads do not divide over {kv_heads} key heads of {head_dim}")
        if not 0 < share <= 1:
            raise ValueError(f"a loop takes a share of the tokens above 0 and at most 1, not {share}")
        self.width = width
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.loop = loop
        self.slot = slot
        self.share = share
        self.kv: Source = kv
        self.bias = bias
        self.bias_o = bias_o
        self.rope = checked(rope, head_dim) if rope is not None else None
        self.qk_norm = qk_norm
        self.window = window
        self.cap = cap
        self.scale = scale
        self.dtype = dtype
        inner, outer = heads * head_dim, kv_heads * head_dim
        self.q = Linear(in_features=width, out_features=inner, bias=bias, dtype=dtype)
        if kv != "hear":
            self.k = Linear(in_features=width, out_features=outer, bias=bias, dtype=dtype)
            self.v = Linear(in_features=width, out_features=outer, bias=bias, dtype=dtype)
        self.o = Linear(in_features=inner, out_features=width, bias=bias_o, dtype=dtype)
        if qk_norm:
            self.q_norm = Norm(width=head_dim, eps=qk_norm, dtype=dtype)
            if kv != "hear":
                self.k_norm = Norm(width=head_dim, eps=qk_norm, dtype=dtype)

    @property
    def says(self) -> str:
        """What `effc show` tells of it."""
        where = {"own": "own keys", "tell": "keys for all loops", "hear": "keys of loop 1"}[self.kv]
        return f"loop {self.loop + 1}, layer {self.slot} of the stack, {where}"

    @property
    def tells(self) -> str | None:
        """The name under which later loops find keys and values."""
        return f"keys {self.slot}" if self.kv == "tell" else None

    @property
    def hears(self) -> str | None:
        """The name under which the first loop tells keys and values."""
        return f"keys {self.slot}" if self.kv == "hear" else None

    def among(self) -> Among:
        """How its tokens attend."""
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        return Among(
            self.heads, self.kv_heads, self.head_dim, self.loop, self.slot, self.kv, self.share, self.rope,
            self.window, scale, self.cap,
        )  # fmt: skip

    def flops(self, mean: int) -> int:
        """Of a token that runs: its keys are those that ran as well, or all that ran the first loop."""
        keys = mean if self.kv == "hear" else math.ceil(self.share * mean)
        keys = keys if self.window is None else min(keys, self.window)
        return 4 * keys * self.heads * self.head_dim

    def kv_bytes(self) -> int:
        """A share of the tokens: keys, values and the slot of each."""
        if self.kv == "hear":
            return 0
        return math.ceil(self.share * self._entry())

    def state_bytes(self) -> int:
        """How many tokens of the row there are."""
        return 0 if self.kv == "hear" else 8

    def cache_bytes(self, tokens: int) -> int:
        if self.kv == "hear":
            return 0
        return math.ceil(self.share * tokens) * self._entry() + self.state_bytes()

    def _entry(self) -> int:
        return 2 * self.kv_heads * self.head_dim * int(DTYPES[self.dtype].itemsize) + 4

    def expand(self, ops: Ops, x: Value) -> Value:
        q = ops("heads", ops.inline("q", self.q, x), count=self.heads)
        q = ops.inline("q_norm", self.q_norm, q) if self.qk_norm else q
        k: Value | None = None
        v: Value | None = None
        if self.kv != "hear":
            k = ops("heads", ops.inline("k", self.k, x), count=self.kv_heads)
            v = ops("heads", ops.inline("v", self.v, x), count=self.kv_heads)
            k = ops.inline("k_norm", self.k_norm, k) if self.qk_norm else k
        y, state = ops.many("attend_among", q, k, v, ops.step, ops.past, how=self.among())
        ops.graph.state = state.number
        return ops.inline("o", self.o, y)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        many = x.shape[1]
        q = self.q(x[0]).view(many, self.heads, self.head_dim)
        q = self.q_norm(q) if self.qk_norm else q
        k = v = None
        if self.kv != "hear":
            k = self.k(x[0]).view(many, self.kv_heads, self.head_dim)
            v = self.v(x[0]).view(many, self.kv_heads, self.head_dim)
            k = self.k_norm(k) if self.qk_norm else k
        cache = step.cache
        past: Past | None = cache.state(self) if cache is not None else None
        y, past = self.among().run(q, k, v, step, past, cache.length if cache is not None else 0)
        if cache is not None and past is not None and self.kv != "hear":
            cache.keep(self, *past)
        out: Tensor = self.o(y.reshape(1, many, self.heads * self.head_dim))
        return out
