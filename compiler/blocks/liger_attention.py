"""LigerAttention: an attention block's own projections, read as a gated recurrence beside a sliding window.

Shapes: x [B, T, d], q [B, H, T, h], k and v [B, Hk, T, h], gates [B, Hk, T, h], or [B, Hk, T, m] over m
slots; state [B, Hk, h, h], or [B, Hk, h, m] and [B, Hk, m, h].
Source: Liger, arXiv 2503.01496, section 3; the forms: GLA 2312.06635, HGRN2 2404.07904, GSA 2409.07146.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from effc.compiler.blocks.linear import Linear
from effc.compiler.blocks.norm import Norm
from effc.compiler.blocks.rope import checked, rotate, tables
from effc.compiler.blocks.unit import DTYPES, Unit
from effc.compiler.ops_state import complement, forget, kept, log_gate, pool, scan, softmax
from effc.compiler.scan import CHUNK, SUB, Over
from effc.compiler.sliding import near
from effc.compiler.step import Step

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value

Form = Literal["gla", "hgrn2", "gsa"]


class LigerAttention(Unit):
    """y = W_o (mix * window attention(rope q, rope k, v) + (1 - mix) * recurrence(q, k, v)).

    The recurrence has no positions and no weights of its own: its gates are sigmoid(pool(W_k x))^(1 /
    gate_div). gla:   S_t = diag(a_t) S_{t-1} + softmax(k_t)^T v_t,  o_t = softmax(q_t) S_t. hgrn2: the same
    with 1 - a_t in place of softmax(k_t) and gate_div = 1. gsa:   slots: K_t = diag(a_t) K_{t-1} + (1 -
    a_t)^T k_t, V_t likewise, o_t = softmax(q_t K_t^T) V_t.
    """

    takes_step = True

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        window: int,
        mix: float = 0.5,
        form: Form = "gla",
        slots: int = 0,
        gate_div: float = 16.0,
        bias: bool = False,
        bias_o: bool = False,
        rope: Mapping[str, Any] | None = None,
        qk_norm: float = 0.0,
        cap: float | None = None,
        scale: float | None = None,
        chunk: int = CHUNK,
        sub: int = SUB,
        dtype: str = "float32",
    ) -> None:
        """`window`: tokens that the softmax part sees, 0 for none of it; `slots`: m of gsa, 0 for h."""
        super().__init__()
        if 0 in (width, heads, head_dim):
            raise ValueError(f"width {width}, {heads} heads of {head_dim}: none may be 0")
        if kv_heads == 0 or heads % kv_heads:
            raise ValueError(f"{heads} query heads do not divide over {kv_heads} key heads")
        if slots and head_dim % slots:
            raise ValueError(f"{head_dim} channels of a key do not divide over {slots} slots")
        if not 0 <= mix <= 1 or not gate_div > 0:
            raise ValueError(f"mix {mix} must be 0 to 1, gate_div {gate_div} above 0")
        if sub < 1 or chunk < 1 or chunk % sub:
            raise ValueError(f"chunk is a multiple of sub, not {chunk} of {sub}")
        self.width = width
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.window = window
        self.mix = mix
        self.form = form
        self.slots = slots
        self.gate_div = gate_div
        self.bias = bias
        self.bias_o = bias_o
        self.rope = checked(rope, head_dim) if rope is not None else None
        self.qk_norm = qk_norm
        self.cap = cap
        self.scale = scale
        self.chunk = chunk
        self.sub = sub
        self.dtype = dtype
        inner, outer = heads * head_dim, kv_heads * head_dim
        self.q = Linear(in_features=width, out_features=inner, bias=bias, dtype=dtype)
        self.k = Linear(in_features=width, out_features=outer, bias=bias, dtype=dtype)
        self.v = Linear(in_features=width, out_features=outer, bias=bias, dtype=dtype)
        self.o = Linear(in_features=inner, out_features=width, bias=bias_o, dtype=dtype)
        if qk_norm:
            self.q_norm = Norm(width=head_dim, eps=qk_norm, dtype=dtype)
            self.k_norm = Norm(width=head_dim, eps=qk_norm, dtype=dtype)

    @property
    def factor(self) -> float:
        """What scores of the window are multiplied by."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def gates(self) -> int:
        """Gates of a key head: a channel each, or a slot each."""
        return (self.slots or self.head_dim) if self.form == "gsa" else self.head_dim

    @property
    def divisor(self) -> float:
        return 1.0 if self.form == "hgrn2" else self.gate_div

    @property
    def share(self) -> float:
        """Of the window in the sum: without a window there is none."""
        return self.mix if self.window else 0.0

    def flops(self, mean: int) -> int:
        """Of the window's keys, and of the chunk form of one scan, or of two for slots."""
        total = 4 * min(self.window, mean) * self.heads * self.head_dim if self.share else 0
        if self.share < 1:
            k, v = self.head_dim, self.gates
            scan = self.heads * self.chunk * (k + v) + 2 * (self.heads + self.kv_heads) * k * v
            total += 2 * scan if self.form == "gsa" else scan
        return total

    def state_bytes(self) -> int:
        return self._recurrent_bytes() + self.window * self._token_bytes()

    def cache_bytes(self, tokens: int) -> int:
        return self._recurrent_bytes() + min(tokens, self.window) * self._token_bytes()

    def _recurrent_bytes(self) -> int:
        if self.share == 1:
            return 0
        states = 2 if self.form == "gsa" else 1
        wide: int = max(4, DTYPES[self.dtype].itemsize)
        return states * self.kv_heads * self.head_dim * self.gates * wide

    def _token_bytes(self) -> int:
        """Of one token in the ring."""
        return 2 * self.kv_heads * self.head_dim * DTYPES[self.dtype].itemsize if self.share else 0

    def expand(self, ops: Ops, x: Value) -> Value:
        q = ops("heads", ops.inline("q", self.q, x), count=self.heads)
        k = ops("heads", ops.inline("k", self.k, x), count=self.kv_heads)
        v = ops("heads_first", ops("heads", ops.inline("v", self.v, x), count=self.kv_heads))
        g = ops("heads_first", ops("pool", k, to=self.gates))
        if self.qk_norm:
            q, k = ops.inline("q_norm", self.q_norm, q), ops.inline("k_norm", self.k_norm, k)
        q, k = ops("heads_first", q), ops("heads_first", k)
        close, far = ops.many("parts", ops.past)
        y = z = None
        if self.share:
            turned = [q, k]
            if self.rope is not None:
                turned = [ops("rope", t, ops.step, parameters=self.rope) for t in turned]
            more = {"window": self.window, "scale": self.factor, "cap": self.cap}
            y, close = ops.many("near", turned[0], turned[1], v, ops.step, close, **more)
        if self.share < 1:
            z, far = self._expanded(ops, q, k, v, ops("log_gate", g, divisor=self.divisor), far)
        ops.graph.state = ops("both", close, far).number
        if y is not None and z is not None:
            y = ops("add", ops("scale", y, factor=self.share), ops("scale", z, factor=1 - self.share))
        return ops.inline("o", self.o, ops("join_heads", y if y is not None else z))

    def _expanded(self, ops: Ops, q: Value, k: Value, v: Value, g: Value, far: Value) -> tuple[Value, Value]:
        """The recurrence in ops -> its output and its state."""
        closed = ops("forget", g, ops.step)

        def scanned(q: Value, k: Value, v: Value, past: Value, over: Over) -> tuple[Value, ...]:
            more = {"over": over, "scale": 1.0, "chunk": self.chunk, "sub": self.sub}
            return ops.many("scan", q, k, v, closed, past, **more)

        if self.form != "gsa":
            key = ops("softmax", k) if self.form == "gla" else ops("cast_like", ops("complement", g), v)
            y, state = scanned(ops("softmax", q), ops("kept", key, ops.step), v, far, "key")
            return y, state
        enter = ops("kept", ops("cast_like", ops("complement", g), v), ops.step)
        keys, values = ops.many("parts", far)
        scores, keys = scanned(q, k, enter, keys, "value")
        y, values = scanned(ops("softmax", scores), enter, v, values, "key")
        return y, ops("both", keys, values)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        batch, length = x.shape[:2]
        q = self.q(x).view(batch, length, self.heads, self.head_dim)
        k = self.k(x).view(batch, length, self.kv_heads, self.head_dim)
        v = self.v(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        g = pool(k, to=self.gates).transpose(1, 2)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        if self.share == 1:
            y = self._window(q, k, v, step)
        else:
            y = self._recurrence(q, k, v, g, step)
            if self.share:
                close = self._window(q, k, v, step)
                y = close * close.new_tensor(self.share) + y * y.new_tensor(1 - self.share)
        out: Tensor = self.o(y.transpose(1, 2).reshape(batch, length, self.heads * self.head_dim))
        return out

    def _window(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        if self.rope is not None:
            cos, sin = tables(self.rope, self.head_dim, step, q.dtype)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if step.cache is not None:
            k, v, slots = step.cache.slide(self, k, v, self.window)
        else:
            slots = step.slots(q.shape[2])
        return near(q, k, v, slots, step, self.window, self.factor, self.cap)

    def _recurrence(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, step: Step) -> Tensor:
        past = (step.cache.state(self) if step.cache is not None else None) or (None, None)
        opened = log_gate(g, divisor=self.divisor)
        closed = forget(opened, step)

        def scanned(
            q: Tensor, k: Tensor, v: Tensor, past: Tensor | None, over: Over
        ) -> tuple[Tensor, Tensor]:
            y, state = scan(q, k, v, closed, past, over=over, scale=1.0, chunk=self.chunk, sub=self.sub)
            return y, state

        state: tuple[Tensor, ...]
        if self.form == "gsa":
            enter = kept(complement(opened).to(v.dtype), step)
            scores, keys = scanned(q, k, enter, past[0], "value")
            y, values = scanned(softmax(scores), enter, v, past[1], "key")
            state = (keys, values)
        else:
            key = softmax(k) if self.form == "gla" else complement(opened).to(v.dtype)
            y, last = scanned(softmax(q), kept(key, step), v, past[0], "key")
            state = (last,)
        if step.cache is not None:
            step.cache.keep(self, *state)
        return y
