"""multi_lora in C: a sum along K for each rank of each row's adapter, then rows of B for 64 channels."""

from __future__ import annotations

from functools import cache

from effc.kernels.cpu.entry import self_contained
from effc.kernels.cpu.stored import STORED
from effc.kernels.multi_lora.spec import MultiLoraSpec

BLOCK = 64
"""Channels of one item of the second product."""


def function(spec: MultiLoraSpec) -> str:
    """Two functions, with a meeting of the members between them.

    `shrink_<key>`: items first to last of M * most (a row, one rank of its adapter; `most` is the largest
    rank) -> h [M, most]; `expand_<key>`: items of M * blocks of 64 channels -> y, which may be base. Rows
    without an adapter are copied.
    """
    kind, key = spec.factor, spec.key
    return f"""{STORED}
static void shrink_{key}(const float *RESTRICT x, const stored_{kind} *RESTRICT a,
    const int32_t *RESTRICT edges, const long *RESTRICT index, long most, float *RESTRICT h, long K,
    long first, long last) {{
  for (long item = first; item < last; item++) {{
    const long m = item / most, row = edges[index[m]] + item % most;
    if (row >= edges[index[m] + 1]) continue;
    const float *p = x + m * K;
    const stored_{kind} *w = a + row * K;
    f32x16 s[2] = {{{{0}}}};
    long k = 0;
    for (; k + 32 <= K; k += 32) {{
      s[0] += load(p + k) * load_{kind}(w + k);
      s[1] += load(p + k + 16) * load_{kind}(w + k + 16);
    }}
    for (; k < K; k += 16) s[0] += take(p + k, K - k) * take_{kind}(w + k, K - k);
    h[item] = sum_of(s[0] + s[1]);
  }}
}}

static void expand_{key}(const float *RESTRICT h, const stored_{kind} *RESTRICT b,
    const int32_t *RESTRICT edges, const float *RESTRICT scales, const long *RESTRICT index, long most,
    const float *base, float *y, long N, long first, long last) {{
  const long blocks = (N + {BLOCK - 1}) / {BLOCK};
  for (long item = first; item < last; item++) {{
    const long m = item / blocks, n = item % blocks * {BLOCK}, i = index[m];
    const long width = N - n < {BLOCK} ? N - n : {BLOCK};
    f32x16 s[{BLOCK // 16}] = {{{{0}}}};
    for (long r = 0; r < edges[i + 1] - edges[i]; r++) {{
      const float by = h[m * most + r] * scales[i];
      const stored_{kind} *w = b + (edges[i] + r) * N + n;
      for (long j = 0; 16 * j < width; j++) s[j] += by * take_{kind}(w + 16 * j, width - 16 * j);
    }}
    for (long j = 0; 16 * j < width; j++) {{
      const long at = m * N + n + 16 * j, count = width - 16 * j;
      give(y + at, take(base + at, count) + s[j], count);
    }}
  }}
}}
"""


FIELDS = {
    "x": "const float *",
    "a": "const void *",
    "b": "const void *",
    "edges": "const int32_t *",
    "scales": "const float *",
    "index": "const long *",
    "base": "const float *",
    "h": "float *",
    "y": "float *",
    "M": "long",
    "N": "long",
    "K": "long",
    "most": "long",
}


@cache
def emit(spec: MultiLoraSpec) -> str:
    """The self-contained file."""
    work = f"""  const long ranks = a->M * a->most, items = a->M * ((a->N + {BLOCK - 1}) / {BLOCK});
  shrink_{spec.key}(a->x, a->a, a->edges, a->index, a->most, a->h, a->K,
                    ranks * member / members, ranks * (member + 1) / members);
  a->team->meet(members);
  expand_{spec.key}(a->h, a->b, a->edges, a->scales, a->index, a->most, a->base, a->y, a->N,
                    items * member / members, items * (member + 1) / members);"""
    return self_contained(spec, function(spec), FIELDS, work)
