"""attention backward in Triton: one program for the keys of a kv head, one for the queries of a head.

With p the weights, o = p v: dv = p^T do, dp = do v^T, ds = p (dp - delta), delta = sum of do o over a head,
dq = scale ds k, dk = scale ds^T q. Each sum belongs to one program and has one order.

The first of them looks at every pair, as copies of its loop for masked and other steps do not fit the
registers beside dk and dv.
"""

from __future__ import annotations

from effc.kernels.attention.heads_triton import bent, lanes, rows_of, scored
from effc.kernels.attention.sight_triton import edges, walk
from effc.kernels.attention.spec import AttentionGpuSpec


def backward(spec: AttentionGpuSpec) -> tuple[str, str, str]:
    """The kernels for delta, for dk and dv, and for dq."""
    return _delta(spec), _keys(spec), _queries(spec)


def _delta(spec: AttentionGpuSpec) -> str:
    h, d = spec.heads, spec.head_dim
    return f"""@triton.jit
def delta_kernel(out, dout, delta, T):
    rm = tl.program_id(0) * 64 + tl.arange(0, 64)
    head = tl.program_id(1)
    d = tl.arange(0, {lanes(d)})
    at = (rm[:, None] * {h} + head) * {d} + d[None, :]
    live = {rows_of(d, "(rm < T)")}
    o = tl.load(out + at, mask=live, other=0.0).to(tl.float32)
    g = tl.load(dout + at, mask=live, other=0.0).to(tl.float32)
    tl.store(delta + head * T + rm, tl.sum(o * g, 1), mask=rm < T)
"""


def _weights(spec: AttentionGpuSpec, product: str, sums: str) -> str:
    """Lines: the weights `p` of a step, and with a cap their scores `s`."""
    scores = scored(product, spec.scale, spec.cap)
    if spec.cap is None:
        return f"    p = tl.exp2({scores} - {sums})\n"
    return f"    s = {scores}\n    p = tl.exp2(s - {sums})\n"


def _keys(spec: AttentionGpuSpec) -> str:
    tile, h, hk, d = spec.of_keys, spec.heads, spec.kv_heads, spec.head_dim
    bm, bn = tile.queries, tile.keys
    call = "dout, q, lse, delta, ks, vs, m, rn, end, head, T, dks, dvs"
    weights = _weights(spec, "tl.dot(ks, tl.trans(qs))", "sums[None, :]")
    low = f"begin + (first - begin) // {bm} * {bm}" if spec.causal else "begin"
    high = "end" if spec.window is None else f"tl.minimum(end, first + {bn + spec.window - 1})"
    return f'''@triton.jit
def keys_step(dout, q, lse, delta, ks, vs, m, rn, end, head, T, dks, dvs):
    """queries m to m + {bm} of one head: dk (without scale) and dv go on"""
    rm = m + tl.arange(0, {bm})
    d = tl.arange(0, {lanes(d)})
    live = rm < end
    at = (rm[:, None] * {h} + head) * {d} + d[None, :]
    qs = tl.load(q + at, mask={rows_of(d, "live")}, other=0.0)
    gs = tl.load(dout + at, mask={rows_of(d, "live")}, other=0.0)
    sums = tl.load(lse + head * T + rm, mask=live, other=0.0)
    less = tl.load(delta + head * T + rm, mask=live, other=0.0)
{weights}    p = tl.where(seen(rm[None, :], rn[:, None], end), p, 0.0)
    dvs = tl.dot(p.to(tl.bfloat16), gs, dvs)
    ds = p * (tl.dot(vs, tl.trans(gs)) - less[None, :]){bent(spec.cap)}
    dks = tl.dot(ds.to(tl.bfloat16), qs, dks)
    return dks, dvs


@triton.jit
def keys_kernel(dout, q, k, v, lse, delta, tiles, dk, dv, T):
    first = tl.load(tiles + 3 * tl.program_id(0))
    begin = tl.load(tiles + 3 * tl.program_id(0) + 1)
    end = tl.load(tiles + 3 * tl.program_id(0) + 2)
    kv = tl.program_id(1)
    if first < end:
        rn = first + tl.arange(0, {bn})
        d = tl.arange(0, {lanes(d)})
        here = (rn[:, None] * {hk} + kv) * {d} + d[None, :]
        inside = {rows_of(d, "(rn < end)")}
        ks = tl.load(k + here, mask=inside, other=0.0)
        vs = tl.load(v + here, mask=inside, other=0.0)
        dks = tl.zeros(({bn}, {lanes(d)}), tl.float32)
        dvs = tl.zeros(({bn}, {lanes(d)}), tl.float32)
        low = {low}
        high = {high}
        for head in range(kv * {spec.group}, (kv + 1) * {spec.group}):
            for m in range(low, high, {bm}):
                dks, dvs = keys_step({call})
        tl.store(dk + here, (dks * {spec.scale!r}).to(dk.dtype.element_ty), mask=inside)
        tl.store(dv + here, dvs.to(dv.dtype.element_ty), mask=inside)
'''


def _queries(spec: AttentionGpuSpec) -> str:
    tile, h, hk, d = spec.of_queries, spec.heads, spec.kv_heads, spec.head_dim
    bm, bn = tile.queries, tile.keys
    call = "dqs = queries_step(qs, gs, sums, less, k, v, n, rm, end, kv, dqs"
    loops = edges(spec, bm, bn) + walk(spec, bn, call)
    return f'''@triton.jit
def queries_step(qs, gs, sums, less, k, v, n, rm, end, kv, dqs, MASK: tl.constexpr):
    """keys n to n + {bn}: dq (without scale) goes on"""
    rn = n + tl.arange(0, {bn})
    d = tl.arange(0, {lanes(d)})
    at = (rn[:, None] * {hk} + kv) * {d} + d[None, :]
    inside = {rows_of(d, "(rn < end)")}
    ks = tl.load(k + at, mask=inside, other=0.0)
    vs = tl.load(v + at, mask=inside, other=0.0)
{_weights(spec, "tl.dot(qs, tl.trans(ks))", "sums[:, None]")}    if MASK:
        p = tl.where(seen(rm[:, None], rn[None, :], end), p, 0.0)
    ds = p * (tl.dot(gs, tl.trans(vs)) - less[:, None]){bent(spec.cap)}
    return tl.dot(ds.to(tl.bfloat16), ks, dqs)


@triton.jit
def queries_kernel(dout, q, k, v, lse, delta, tiles, dq, T):
    first = tl.load(tiles + 3 * tl.program_id(0))
    begin = tl.load(tiles + 3 * tl.program_id(0) + 1)
    end = tl.load(tiles + 3 * tl.program_id(0) + 2)
    head = tl.program_id(1)
    kv = head // {spec.group}
    if first < end:
        rm = first + tl.arange(0, {bm})
        live = rm < end
        d = tl.arange(0, {lanes(d)})
        at = (rm[:, None] * {h} + head) * {d} + d[None, :]
        qs = tl.load(q + at, mask={rows_of(d, "live")}, other=0.0)
        gs = tl.load(dout + at, mask={rows_of(d, "live")}, other=0.0)
        sums = tl.load(lse + head * T + rm, mask=live, other=0.0)
        less = tl.load(delta + head * T + rm, mask=live, other=0.0)
        dqs = tl.zeros(({bm}, {lanes(d)}), tl.float32)
{loops}        tl.store(dq + at, (dqs * {spec.scale!r}).to(dq.dtype.element_ty), mask={rows_of(d, "live")})
'''
