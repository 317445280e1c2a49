"""linear_attention in C: rows are made ready, then, behind a barrier, each member keeps states of its own.

An item of the second part is 16 values of a head, whose part of the state [K, 16] stays in the nearest cache
while all rows of the call pass over it. Decoding reads and writes a state once a token, whatever came before.
"""

from __future__ import annotations

from functools import cache

from effc.kernels.cpu.entry import self_contained
from effc.kernels.cpu.parts import PARTS
from effc.kernels.linear_attention.spec_c import RecurrentSpec

GATES = r"""
#ifndef GATES
#define GATES
/* log(1 + e) for e in 0..1: 2 artanh(e / (2 + e)) */
INLINE f32x16 log_of_one_and(f32x16 e) {
  const f32x16 z = e / (2.0f + e), s = z * z;
  f32x16 p = s * 0.153846154f + 0.181818182f;
  p = p * s + 0.222222222f;
  p = p * s + 0.285714286f;
  p = p * s + 0.4f;
  p = p * s + 0.666666667f;
  return p * s * z + 2.0f * z;
}
/* log sigmoid(x) */
INLINE f32x16 log_gate(f32x16 x) {
  return choose(x < 0.0f, x, all(0.0f)) - log_of_one_and(exponential(-magnitude(x)));
}
/* 1 - e^g for g <= 0, exact to the last digits where g is near 0 */
INLINE f32x16 entry(f32x16 g) {
  f32x16 p = all(1.9875691500e-4f);
  p = p * g + 1.3981999507e-3f;
  p = p * g + 8.3334519073e-3f;
  p = p * g + 4.1665795894e-2f;
  p = p * g + 1.6666665459e-1f;
  p = p * g + 5.0000001201e-1f;
  return choose(g > -0.34f, -(p * g * g + g), 1.0f - exponential(g));
}
/* y [size] = softmax(y) times scale */
static void soften(float *y, long size, float scale) {
  f32x16 most = all(-INFINITY), sum = {0};
  for (long d = 0; d < size; d += 16)
    for (long i = d; i < size && i < d + 16; i++)
      most[i - d] = y[i] > most[i - d] || y[i] != y[i] ? y[i] : most[i - d];
  const float top = largest_of(most);
  for (long d = 0; d < size; d += 16) {
    f32x16 e = exponential(take(y + d, size - d) - top);
    if (size - d < 16) for (long i = size - d; i < 16; i++) e[i] = 0;
    sum += e;
    give(y + d, e, size - d);
  }
  const float by = scale / sum_of(sum);
  for (long d = 0; d < size; d += 16) give(y + d, take(y + d, size - d) * by, size - d);
}
#endif
"""


def function(spec: RecurrentSpec) -> str:
    """Both functions.

    `prepare_<key>`: items first to last of the M Hk pairs of a row and a key head -> queries [M, H, K], keys
    [M, Hk, K], values [M, Hk, V] (only where 1 - a stands for v), decay [M, Hk, gates].
    `recur_<key>`: items of Hk times vectors of V -> y [M, H V] and states [slots, Hk, blocks, K, 16].
    """
    return PARTS + GATES + _prepare(spec) + _recur(spec)


def _prepare(spec: RecurrentSpec) -> str:
    key, k, group, gates = spec.key, spec.key_dim, spec.group, spec.gates
    padded = -(-gates // 16) * 16
    pooled = (
        f"for (long i = 0; i < {gates}; i++) "
        f"{{ float s = 0; for (long p = 0; p < {spec.pool}; p++) s += from[i * {spec.pool} + p]; "
        f"mean[i] = s * {1 / spec.pool!r}f; }}"
        if spec.pool > 1
        else f"memcpy(mean, from, {4 * gates});"
    )
    norm = f"norm_of_{key}(to, {{}}_gain);" if spec.norm else ""
    scaled = (
        f"soften(to, {k}, {spec.scale!r}f);"
        if spec.q == "softmax"
        else f"for (long d = 0; d < {k}; d++) to[d] *= {spec.scale!r}f;" if spec.scale != 1 else ""
    )  # fmt: skip
    if spec.k == "entry":
        keyed = f"memcpy(keys + item * {k}, let_in, {4 * k});"
    else:
        soft = f"soften(to, {k}, 1.0f);" if spec.k == "softmax" else ""
        keyed = (
            f"{{ float *to = keys + item * {k};\n      memcpy(to, k + m * k_stride + j * {k}, {4 * k});\n"
            f"      {norm.format('k')} {soft} }}"
        )
    valued = f"memcpy(values + item * {gates}, let_in, {4 * gates});" if spec.v == "entry" else ""
    return f"""{_norm(spec)}
static void prepare_{key}(const float *RESTRICT q, const float *RESTRICT k, const float *RESTRICT x,
    long q_stride, long k_stride, long x_stride, const float *RESTRICT q_gain, const float *RESTRICT k_gain,
    float *RESTRICT queries, float *RESTRICT keys, float *RESTRICT values, float *RESTRICT decay,
    long first, long last) {{
  for (long item = first; item < last; item++) {{
    const long m = item / {spec.kv_heads}, j = item % {spec.kv_heads};
    const float *from = x + m * x_stride + j * {gates * spec.pool};
    float mean[{padded}] = {{0}}, let_in[{padded}];
    {pooled}
    for (long i = 0; i < {gates}; i += 16) {{
      const f32x16 g = log_gate(load(mean + i)) * {1 / spec.divisor!r}f;
      give(decay + item * {gates} + i, exponential(g), {gates} - i);
      store(let_in + i, entry(g));
    }}
    for (long i = 0; i < {group}; i++) {{
      float *to = queries + (item * {group} + i) * {k};
      memcpy(to, q + m * q_stride + (j * {group} + i) * {k}, {4 * k});
      {norm.format("q")} {scaled}
    }}
    {keyed}
    {valued}
  }}
}}
"""


def _norm(spec: RecurrentSpec) -> str:
    if not spec.norm:
        return ""
    k = spec.key_dim
    return f"""
INLINE void norm_of_{spec.key}(float *y, const float *gain) {{
  f32x16 squares = {{0}};
  for (long d = 0; d < {k}; d += 16) {{ f32x16 a = take(y + d, {k} - d); squares += a * a; }}
  const float inverse = 1.0f / sqrtf(sum_of(squares) * {1 / k!r}f + {spec.norm!r}f);
  for (long d = 0; d < {k}; d++) y[d] = y[d] * inverse * (gain[d] + {spec.norm_offset!r}f);
}}
"""


def _recur(spec: RecurrentSpec) -> str:
    key, k, v, group = spec.key, spec.key_dim, spec.value_dim, spec.group
    chains = 4 if group <= 2 else 2 if group <= 4 else 1
    if spec.shared:
        gate, each = f"const float all_of = decay[m * {spec.kv_heads} + j];", "all_of"
    elif spec.over == "key":
        gate, each = f"const float *a = decay + (m * {spec.kv_heads} + j) * {k};", "a[d]"
    else:
        gate = f"const f32x16 a = take(decay + (m * {spec.kv_heads} + j) * {v} + 16 * b, count);"
        each = "a"
    values = f"v + m * v_stride + j * {v} + 16 * b"
    end = "take(y + at, count) + " if spec.residual else ""
    adds = " + ".join(f"o[i][{c}]" for c in range(chains))
    return f"""
static void recur_{key}(const float *RESTRICT queries, const float *RESTRICT keys, const float *RESTRICT v,
    long v_stride, const float *RESTRICT decay, const int64_t *RESTRICT slot,
    const int64_t *RESTRICT position, float *RESTRICT states, float *y, long M, long first, long last) {{
  for (long item = first; item < last; item++) {{
    const long j = item / {spec.blocks}, b = item % {spec.blocks}, count = {v} - 16 * b;
    for (long m = 0; m < M; m++) {{
      float *s = states + ((slot[m] * {spec.kv_heads} + j) * {spec.blocks} + b) * {16 * k};
      if (position[m] == 0) memset(s, 0, {64 * k});
      const float *key = keys + (m * {spec.kv_heads} + j) * {k};
      const float *q = queries + (m * {spec.kv_heads} + j) * {group * k};
      const f32x16 value = take({values}, count);
      {gate}
      f32x16 o[{group}][{chains}] = {{{{{{0}}}}}};
      for (long d = 0; d < {k}; d++) {{
        const f32x16 now = load(s + 16 * d) * {each} + value * key[d];
        store(s + 16 * d, now);
        UNROLL for (long i = 0; i < {group}; i++) o[i][d % {chains}] += now * q[i * {k} + d];
      }}
      for (long i = 0; i < {group}; i++) {{
        const long at = (m * {spec.heads} + j * {group} + i) * {v} + 16 * b;
        give(y + at, {end}({adds}), count);
      }}
    }}
  }}
}}
"""


FIELDS: dict[str, str] = dict.fromkeys(("q", "k", "v", "x", "q_gain", "k_gain"), "const float *")
FIELDS |= dict.fromkeys(("slot", "position"), "const int64_t *")
FIELDS |= dict.fromkeys(("states", "queries", "keys", "values", "decay", "y"), "float *") | {"M": "long"}


@cache
def emit(spec: RecurrentSpec) -> str:
    """The self-contained file."""
    entry = spec.v == "entry"
    values = "a->values" if entry else "a->v"
    sizes = [spec.heads * spec.key_dim, spec.kv_heads * spec.key_dim, spec.kv_heads * spec.gates * spec.pool]
    work = f"""  const long items = a->M * {spec.kv_heads}, parts = {spec.kv_heads * spec.blocks};
  prepare_{spec.key}(a->q, a->k, a->x, {sizes[0]}, {sizes[1]}, {sizes[2]}, a->q_gain, a->k_gain, a->queries,
    a->keys, a->values, a->decay, items * member / members, items * (member + 1) / members);
  a->team->meet(members);
  recur_{spec.key}(a->queries, a->keys, {values}, {spec.kv_heads * spec.value_dim}, a->decay, a->slot,
    a->position, a->states, a->y, a->M, parts * member / members, parts * (member + 1) / members);"""
    return self_contained(spec, function(spec), FIELDS, work)
