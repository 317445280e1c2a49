"""linear_attention forward in Triton: sums of gates, states between chunks, weights of pairs, outputs.

Rows behind a sequence's end load zeros, whose gates change nothing and whose keys write nothing.
"""

from __future__ import annotations

import math

from effc.kernels.linear_attention.spec_gpu import BLOCK, CHUNK, FLOOR, LEVELS, LinearAttentionGpuSpec


def forward(spec: LinearAttentionGpuSpec) -> tuple[str, ...]:
    """The kernels in the order they run."""
    return _sums(spec), _states(spec), *_weights(spec), _outputs(spec)


def gates(spec: LinearAttentionGpuSpec, rows: str, channels: str) -> str:
    """An offset into the gates: of tokens `rows` and channels `channels` of key head kv."""
    if spec.gate == "head":
        return f"({rows}) * {spec.kv_heads} + kv"
    return f"(({rows}) * {spec.kv_heads} + kv) * {spec.key_dim} + {channels}"


def chunk(last: bool = False) -> str:
    """Lines: what every program of one chunk begins with."""
    more = "        edge = tl.minimum(first + 64, stop) - 1\n" if last else ""
    return f"""    c = tl.program_id(0)
    first = tl.load(chunks + 2 * c)
    stop = tl.load(chunks + 2 * c + 1)
    if first < stop:
        i = tl.arange(0, {CHUNK})
        rows = first + i
        live = (rows < stop)[:, None]
{more}"""


def _sums(spec: LinearAttentionGpuSpec) -> str:
    width = spec.kv_heads * spec.gates
    block = 64 if spec.gate == "key" else 16
    return f'''@triton.jit
def sums_kernel(g, chunks, sums):
    """sums of log gates in base 2, from the start of a token's chunk up to it, the token included"""
    first = tl.load(chunks + 2 * tl.program_id(0))
    stop = tl.load(chunks + 2 * tl.program_id(0) + 1)
    if first < stop:
        rows = first + tl.arange(0, {CHUNK})
        columns = tl.program_id(1) * {block} + tl.arange(0, {block})
        at = rows[:, None] * {width} + columns[None, :]
        live = (rows < stop)[:, None] & (columns < {width})[None, :]
        each = tl.load(g + at, mask=live, other=0.0) * {math.log2(math.e)!r}
        tl.store(sums + at, tl.cumsum(tl.maximum(each, {FLOOR!r}), 0), mask=live)
'''


def _states(spec: LinearAttentionGpuSpec) -> str:
    hk, k, v = spec.kv_heads, spec.key_dim, spec.value_dim
    per_key = spec.gate == "key"
    near = gates(spec, "rows[None, :]" if per_key else "rows", "d[:, None]")
    last = gates(spec, f"tl.minimum(first + {CHUNK}, end) - 1", "d")
    lost = "edge[:, None] - gs" if per_key else "(edge - gs)[None, :]"
    return f'''@triton.jit
def states_kernel(k, v, sums, starts, before, past, states, last, PAST: tl.constexpr):
    """the state at the start of every chunk, in bfloat16, and the one after the last, for one block of it"""
    b = tl.program_id(0)
    begin = tl.load(starts + b)
    end = tl.load(starts + b + 1)
    number = tl.load(before + b)
    kv = tl.program_id(1)
    d = tl.program_id(2) // {v // BLOCK} * {BLOCK} + tl.arange(0, {BLOCK})
    e = tl.program_id(2) % {v // BLOCK} * {BLOCK} + tl.arange(0, {BLOCK})
    block = d[:, None] * {v} + e[None, :]
    here = (b * {hk} + kv) * {k * v} + block
    state = tl.zeros(({BLOCK}, {BLOCK}), tl.float32)
    if PAST:
        state += tl.load(past + here)
    for first in range(begin, end, {CHUNK}):
        c = number + (first - begin) // {CHUNK}
        tl.store(states + (c.to(tl.int64) * {hk} + kv) * {k * v} + block, state.to(tl.bfloat16))
        rows = first + tl.arange(0, {CHUNK})
        live = rows < end
        ks = tl.load(k + (rows[None, :] * {hk} + kv) * {k} + d[:, None], mask=live[None, :], other=0.0)
        vs = tl.load(v + (rows[:, None] * {hk} + kv) * {v} + e[None, :], mask=live[:, None], other=0.0)
        gs = tl.load(sums + {near}, mask=live{"[None, :]" if per_key else ""}, other=0.0)
        edge = tl.load(sums + {last})
        ks = (ks * tl.exp2({lost})).to(tl.bfloat16)
        state = tl.dot(ks, vs, state * tl.exp2(edge){"[:, None]" if per_key else ""})
    tl.store(last + here, state.to(last.dtype.element_ty))
'''


def _weights(spec: LinearAttentionGpuSpec) -> tuple[str, ...]:
    h, hk, k, bk = spec.heads, spec.kv_heads, spec.key_dim, spec.keys
    head = f'''@triton.jit
def weights_kernel(q, k, sums, chunks, weights):
    """weight of every pair of tokens of a chunk for one head, without scale: 0 where the second is later"""
    head = tl.program_id(1)
    kv = head // {spec.group}
{chunk()}        acc = tl.zeros(({CHUNK}, {CHUNK}), tl.float32)
        for k0 in range(0, {k}, {bk}):
            d = k0 + tl.arange(0, {bk})[None, :]
            qs = tl.load(q + (rows[:, None] * {h} + head) * {k} + d, mask=live, other=0.0)
            ks = tl.load(k + (rows[:, None] * {hk} + kv) * {k} + d, mask=live, other=0.0)
'''
    foot = f"""        acc = tl.where(i[:, None] >= i[None, :], acc, 0.0)
        at = (rows[:, None] * {h} + head) * {CHUNK} + i[None, :]
        tl.store(weights + at, acc.to(tl.bfloat16), mask=live)
"""
    if spec.gate == "head":
        body = f"""            acc = tl.dot(qs, tl.trans(ks), acc)
        gs = tl.load(sums + rows * {hk} + kv, mask=rows < stop, other=0.0)
        acc *= tl.exp2(tl.minimum(gs[:, None] - gs[None, :], 0.0))
"""
        return (head + body + foot,)
    body = f"""            gs = tl.load(sums + {gates(spec, "rows[:, None]", "d")}, mask=live, other=0.0)
            acc += tl.where(i[:, None] == i[None, :], tl.dot(qs, tl.trans(ks)), 0.0)
            for n in range(0, {LEVELS}):
                z = tl.where((i >> n & 1 == 1)[:, None], qs, ks) * decayed(gs, sums, first, stop, kv, d, n)
                z = z.to(tl.bfloat16)
                acc += tl.where((i[:, None] ^ i[None, :]) >> n == 1, tl.dot(z, tl.trans(z)), 0.0)
"""
    return _decayed(spec), head + body + foot


def _decayed(spec: LinearAttentionGpuSpec) -> str:
    return f'''@triton.jit
def decayed(gs, sums, first, stop, kv, d, n):
    """decay between each token and the edge of its block of 2^n and that block's neighbor: never above 1"""
    at = first + (tl.arange(0, {CHUNK}) >> n + 1 << n + 1) + (1 << n) - 1
    edge = tl.load(sums + {gates(spec, "at[:, None]", "d")}, mask=(at < stop)[:, None], other=0.0)
    return tl.exp2(-tl.abs(gs - edge))
'''


def _outputs(spec: LinearAttentionGpuSpec) -> str:
    h, hk, k, v, bk, bv = spec.heads, spec.kv_heads, spec.key_dim, spec.value_dim, spec.keys, spec.values
    if spec.gate == "key":
        near = f"tl.load(sums + {gates(spec, 'rows[:, None]', 'd[None, :]')}, mask=live, other=0.0)"
        decay = f"            qs = (qs * tl.exp2({near})).to(tl.bfloat16)\n"
        after = ""
    else:
        decay = ""
        near = f"tl.load(sums + rows * {hk} + kv, mask=rows < stop, other=0.0)"
        after = f"        acc *= tl.exp2({near})[:, None]\n"
    return f'''@triton.jit
def outputs_kernel(q, v, sums, weights, states, chunks, out):
    """outputs of a chunk and head: from the state before the chunk, and from tokens of the chunk"""
    head = tl.program_id(1)
    kv = head // {spec.group}
{chunk()}        e = tl.program_id(2) * {bv} + tl.arange(0, {bv})
        acc = tl.zeros(({CHUNK}, {bv}), tl.float32)
        for n in range(0, {k}, {bk}):
            d = n + tl.arange(0, {bk})
            qs = tl.load(q + (rows[:, None] * {h} + head) * {k} + d[None, :], mask=live, other=0.0)
{decay}            at = (c.to(tl.int64) * {hk} + kv) * {k * v} + d[:, None] * {v} + e[None, :]
            acc = tl.dot(qs, tl.load(states + at), acc)
{after}        at = (rows[:, None] * {h} + head) * {CHUNK} + i[None, :]
        ws = tl.load(weights + at, mask=live, other=0.0)
        vs = tl.load(v + (rows[:, None] * {hk} + kv) * {v} + e[None, :], mask=live, other=0.0)
        acc = tl.dot(ws, vs, acc) * {spec.scale!r}
        at = (rows[:, None] * {h} + head) * {v} + e[None, :]
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=live)
'''
