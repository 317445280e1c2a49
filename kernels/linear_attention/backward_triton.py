"""linear_attention backward in Triton: slopes of states from the end, then of queries, keys, gates, values.

The slope of a log gate is the sum of weight times slope over all pairs that it lies between. It is added up
from those pairs alone, at every size of block anew, and never as the difference of two longer sums.
"""

from __future__ import annotations

from effc.kernels.linear_attention.forward_triton import chunk, gates
from effc.kernels.linear_attention.spec_gpu import BLOCK, CHUNK, LEVELS, LinearAttentionGpuSpec


def backward(spec: LinearAttentionGpuSpec) -> tuple[str, ...]:
    """The kernels in the order they run."""
    inner = (_level_slopes(spec), _slopes(spec)) if spec.gate == "key" else (_head_slopes(spec),)
    return _state_slopes(spec), *inner, _value_slopes(spec)


def _state_slopes(spec: LinearAttentionGpuSpec) -> str:
    h, hk, k, v = spec.heads, spec.kv_heads, spec.key_dim, spec.value_dim
    per_key = spec.gate == "key"
    near = gates(spec, "rows[None, :]" if per_key else "rows", "d[:, None]")
    last = gates(spec, f"tl.minimum(first + {CHUNK}, end) - 1", "d")
    inside, there = ("[None, :]", "[:, None]") if per_key else ("", "")
    return f'''@triton.jit
def state_slopes_kernel(dout, q, sums, starts, before, dlast, dstates, dpast, LAST: tl.constexpr):
    """slopes of the state after every chunk, and of the first state, for one block of it"""
    b = tl.program_id(0)
    begin = tl.load(starts + b)
    end = tl.load(starts + b + 1)
    number = tl.load(before + b)
    kv = tl.program_id(1)
    d = tl.program_id(2) // {v // BLOCK} * {BLOCK} + tl.arange(0, {BLOCK})
    e = tl.program_id(2) % {v // BLOCK} * {BLOCK} + tl.arange(0, {BLOCK})
    block = d[:, None] * {v} + e[None, :]
    here = (b * {hk} + kv) * {k * v} + block
    slope = tl.zeros(({BLOCK}, {BLOCK}), tl.float32)
    if LAST:
        slope += tl.load(dlast + here)
    count = (end - begin + {CHUNK - 1}) // {CHUNK}
    for back in range(0, count):
        n = count - 1 - back
        first = begin + n * {CHUNK}
        c = number + n
        tl.store(dstates + (c.to(tl.int64) * {hk} + kv) * {k * v} + block, slope.to(tl.bfloat16))
        rows = first + tl.arange(0, {CHUNK})
        live = rows < end
        decay = tl.exp2(tl.load(sums + {near}, mask=live{inside}, other=0.0)) * {spec.scale!r}
        slope *= tl.exp2(tl.load(sums + {last})){there}
        for head in range(kv * {spec.group}, (kv + 1) * {spec.group}):
            qs = tl.load(q + (rows[None, :] * {h} + head) * {k} + d[:, None], mask=live[None, :], other=0.0)
            at = (rows[:, None] * {h} + head) * {v} + e[None, :]
            os = tl.load(dout + at, mask=live[:, None], other=0.0)
            slope = tl.dot((qs * decay{"" if per_key else "[None, :]"}).to(tl.bfloat16), os, slope)
    tl.store(dpast + here, slope.to(dpast.dtype.element_ty))
'''


def _level_slopes(spec: LinearAttentionGpuSpec) -> str:
    return f'''@triton.jit
def level(both, qs, ks, gs, sums, first, stop, kv, d, dg, n):
    """slopes of what odd blocks of 2^n (queries) and even ones (keys) are to each other; dg goes on"""
    i = tl.arange(0, {CHUNK})
    odd = (i >> n & 1 == 1)[:, None]
    decay = decayed(gs, sums, first, stop, kv, d, n)
    x = tl.where(odd, qs, ks)
    apart = (i[:, None] ^ i[None, :]) >> n
    near = tl.where(apart == 1, both, 0.0).to(tl.bfloat16)
    slope = tl.dot(near, (x * decay).to(tl.bfloat16)) * decay
    # A gate lies between a pair's edge and its query, or between its key and the edge.
    after = tl.where(odd, i[None, :] >= i[:, None], i[None, :] < i[:, None])
    inside = tl.where(after & (apart == 0), 1.0, 0.0).to(tl.bfloat16)
    dg = tl.dot(inside, (x * slope).to(tl.bfloat16), dg)
    return slope, dg
'''


def _states_of(spec: LinearAttentionGpuSpec, name: str) -> str:
    """A block [keys, values] of the states of chunk c, transposed."""
    k, v = spec.key_dim, spec.value_dim
    at = f"(c.to(tl.int64) * {spec.kv_heads} + kv) * {k * v} + d[None, :] * {v} + e[:, None]"
    return f"tl.load({name} + {at})"


def _of_keys(spec: LinearAttentionGpuSpec) -> str:
    """Lines: dk of what a chunk writes into the state, without decay, and what the state keeps."""
    hk, v = spec.kv_heads, spec.value_dim
    return f"""        for n in range(0, {v}, {BLOCK}):
            e = n + tl.arange(0, {BLOCK})
            vs = tl.load(v + (rows[:, None] * {hk} + kv) * {v} + e[None, :], mask=live, other=0.0)
            hs = {_states_of(spec, "states")}
            ds = {_states_of(spec, "dstates")}
            dks = tl.dot(vs, ds, dks)
            whole += tl.sum(hs.to(tl.float32) * ds.to(tl.float32), 0)
"""


def _of_queries(spec: LinearAttentionGpuSpec) -> str:
    """Lines: dq of what the state gives, without decay, and the slopes of the weights of pairs."""
    h, hk, v = spec.heads, spec.kv_heads, spec.value_dim
    return f"""            for n in range(0, {v}, {BLOCK}):
                e = n + tl.arange(0, {BLOCK})
                vs = tl.load(v + (rows[:, None] * {hk} + kv) * {v} + e[None, :], mask=live, other=0.0)
                os = tl.load(dout + (rows[:, None] * {h} + head) * {v} + e[None, :], mask=live, other=0.0)
                hs = {_states_of(spec, "states")}
                dqs = tl.dot(os, hs, dqs)
                dws = tl.dot(os, tl.trans(vs), dws)
"""


def _slopes(spec: LinearAttentionGpuSpec) -> str:
    h, hk, k, bk = spec.heads, spec.kv_heads, spec.key_dim, spec.keys
    return f'''@triton.jit
def slopes_kernel(dout, q, k, v, sums, weights, states, dstates, chunks, dq, dk, dg, T):
    """slopes of queries, keys and gates of one key head, for some of its channels"""
    kv = tl.program_id(1)
{chunk(last=True)}        d = tl.program_id(2) * {bk} + tl.arange(0, {bk})
        here = (rows[:, None] * {hk} + kv) * {k} + d[None, :]
        ks = tl.load(k + here, mask=live, other=0.0)
        gs = tl.load(sums + here, mask=live, other=0.0)
        end = tl.load(sums + (edge * {hk} + kv) * {k} + d)
        dks = tl.zeros(({CHUNK}, {bk}), tl.float32)
        whole = tl.zeros(({bk},), tl.float32)
{_of_keys(spec)}        dks *= tl.exp2(end[None, :] - gs)
        behind = tl.where(i[None, :] < i[:, None], 1.0, 0.0).to(tl.bfloat16)
        dgs = tl.zeros(({CHUNK}, {bk}), tl.float32) + (whole * tl.exp2(end))[None, :]
        dgs = tl.dot(behind, (ks * dks).to(tl.bfloat16), dgs)
        for head in range(kv * {spec.group}, (kv + 1) * {spec.group}):
            dqs = tl.zeros(({CHUNK}, {bk}), tl.float32)
            dws = tl.zeros(({CHUNK}, {CHUNK}), tl.float32)
{_of_queries(spec)}            dqs *= tl.exp2(gs) * {spec.scale!r}
            at = (rows[:, None] * {h} + head) * {k} + d[None, :]
            qs = tl.load(q + at, mask=live, other=0.0)
            ahead = tl.where(i[None, :] >= i[:, None], 1.0, 0.0).to(tl.bfloat16)
            dgs = tl.dot(ahead, (qs * dqs).to(tl.bfloat16), dgs)
            dws *= {spec.scale!r}
            own = tl.sum(tl.where(i[:, None] == i[None, :], dws, 0.0), 1)[:, None]
            dqs += own * ks
            dks += own * qs
            below = tl.where(i[:, None] > i[None, :], dws, 0.0)
            both = below + tl.trans(below)
            for n in range(0, {LEVELS}):
                slope, dgs = level(both, qs, ks, gs, sums, first, stop, kv, d[None, :], dgs, n)
                dqs += tl.where((i >> n & 1 == 1)[:, None], slope, 0.0)
                dks += tl.where((i >> n & 1 == 0)[:, None], slope, 0.0)
            tl.store(dq + at, dqs.to(dq.dtype.element_ty), mask=live)
        tl.store(dk + here, dks.to(dk.dtype.element_ty), mask=live)
        tl.store(dg + here, dgs.to(dg.dtype.element_ty), mask=live)
'''


def _head_slopes(spec: LinearAttentionGpuSpec) -> str:
    h, hk, k, bk = spec.heads, spec.kv_heads, spec.key_dim, spec.keys
    return f'''@triton.jit
def slopes_kernel(dout, q, k, v, sums, weights, states, dstates, chunks, dq, dk, dg, T):
    """slopes of queries and keys of one key head for some of its channels, and their share of the gate's"""
    kv = tl.program_id(1)
{chunk(last=True)}        d = tl.program_id(2) * {bk} + tl.arange(0, {bk})
        here = (rows[:, None] * {hk} + kv) * {k} + d[None, :]
        ks = tl.load(k + here, mask=live, other=0.0)
        gs = tl.load(sums + rows * {hk} + kv, mask=rows < stop, other=0.0)
        end = tl.load(sums + edge * {hk} + kv)
        dks = tl.zeros(({CHUNK}, {bk}), tl.float32)
        whole = tl.zeros(({bk},), tl.float32)
{_of_keys(spec)}        dks *= tl.exp2(end - gs)[:, None]
        behind = i[None, :] < i[:, None]
        ahead = i[None, :] >= i[:, None]
        dgs = tl.zeros(({CHUNK},), tl.float32) + tl.sum(whole) * tl.exp2(end)
        dgs += tl.sum(tl.where(behind, tl.sum(ks * dks, 1)[None, :], 0.0), 1)
        for head in range(kv * {spec.group}, (kv + 1) * {spec.group}):
            dqs = tl.zeros(({CHUNK}, {bk}), tl.float32)
            dws = tl.zeros(({CHUNK}, {CHUNK}), tl.float32)
{_of_queries(spec)}            dqs *= tl.exp2(gs)[:, None] * {spec.scale!r}
            own = (rows[:, None] * {h} + head) * {k} + d[None, :]
            qs = tl.load(q + own, mask=live, other=0.0)
            dgs += tl.sum(tl.where(ahead, tl.sum(qs * dqs, 1)[None, :], 0.0), 1)
            dws *= {spec.scale!r}
            if tl.program_id(2) == 0:
                at = (rows[:, None] * {h} + head) * {CHUNK} + i[None, :]
                ws = tl.load(weights + at, mask=live, other=0.0)
                each = tl.where(i[:, None] > i[None, :], dws * ws, 0.0).to(tl.bfloat16)
                after = tl.dot(ahead.to(tl.bfloat16), each)
                dgs += tl.sum(tl.where(behind, after, 0.0), 1)
            dws *= tl.exp2(tl.minimum(gs[:, None] - gs[None, :], 0.0))
            dws = tl.where(i[:, None] >= i[None, :], dws, 0.0).to(tl.bfloat16)
            dqs = tl.dot(dws, ks, dqs)
            dks = tl.dot(tl.trans(dws), qs, dks)
            tl.store(dq + own, dqs.to(dq.dtype.element_ty), mask=live)
        tl.store(dk + here, dks.to(dk.dtype.element_ty), mask=live)
        at = (tl.program_id(2) * T + rows) * {hk} + kv
        tl.store(dg + at, dgs.to(dg.dtype.element_ty), mask=rows < stop)
'''


def _value_slopes(spec: LinearAttentionGpuSpec) -> str:
    h, hk, k, v, bk, bv = spec.heads, spec.kv_heads, spec.key_dim, spec.value_dim, spec.keys, spec.values
    if spec.gate == "key":
        near = f"tl.load(sums + {gates(spec, 'rows[:, None]', 'd[None, :]')}, mask=live, other=0.0)"
        last = f"tl.load(sums + {gates(spec, 'edge', 'd')})[None, :]"
    else:
        near = f"tl.load(sums + rows * {hk} + kv, mask=rows < stop, other=0.0)[:, None]"
        last = f"tl.load(sums + edge * {hk} + kv)"
    return f'''@triton.jit
def value_slopes_kernel(dout, k, sums, weights, dstates, chunks, dv):
    """slopes of values of one key head, for some of their channels"""
    kv = tl.program_id(1)
{chunk(last=True)}        e = tl.program_id(2) * {bv} + tl.arange(0, {bv})
        acc = tl.zeros(({CHUNK}, {bv}), tl.float32)
        for head in range(kv * {spec.group}, (kv + 1) * {spec.group}):
            ws = tl.load(weights + (rows[:, None] * {h} + head) * {CHUNK} + i[None, :], mask=live, other=0.0)
            os = tl.load(dout + (rows[:, None] * {h} + head) * {v} + e[None, :], mask=live, other=0.0)
            acc = tl.dot(tl.trans(ws), os, acc)
        acc *= {spec.scale!r}
        for n in range(0, {k}, {bk}):
            d = n + tl.arange(0, {bk})
            ks = tl.load(k + (rows[:, None] * {hk} + kv) * {k} + d[None, :], mask=live, other=0.0)
            ks = (ks * tl.exp2({last} - {near})).to(tl.bfloat16)
            at = (c.to(tl.int64) * {hk} + kv) * {k * v} + d[:, None] * {v} + e[None, :]
            acc = tl.dot(ks, tl.load(dstates + at), acc)
        tl.store(dv + (rows[:, None] * {hk} + kv) * {v} + e[None, :], acc.to(dv.dtype.element_ty), mask=live)
'''
