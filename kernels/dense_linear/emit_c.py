"""dense_linear in C: vectors along K, rows of W side by side, 16 sums turned into one vector of results.

The limit of one row of x is reading W once: eight rows of W at a time are eight streams and eight chains of
sums. With more rows of x each loaded vector of W serves them all.
"""

from __future__ import annotations

from functools import cache

from effc.kernels.cpu.entry import self_contained
from effc.kernels.cpu.stored import STORED
from effc.kernels.dense_linear.spec import BLOCK, DenseLinearSpec
from effc.kernels.epilogue import EPILOGUES, operands

REDUCE = r"""
#ifndef REDUCE
#define REDUCE
typedef float f32x8 __attribute__((vector_size(32)));
#if defined(__clang__)
#define MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t i32x8 __attribute__((vector_size(32)));
#define MIX(a, b, ...) __builtin_shuffle(a, b, (i32x8){__VA_ARGS__})
#endif
INLINE f32x8 fold(f32x16 v) {
  f32x8 half[2];
  memcpy(half, &v, sizeof v);
  return half[0] + half[1];
}
/* lane j = sum of the lanes of s[j]; always in the same order */
INLINE f32x16 sums_of(const f32x16 s[16]) {
  f32x8 out[2];
  for (int h = 0; h < 2; h++) {
    f32x8 a[8], b[4], c[2];
    for (int j = 0; j < 8; j++) a[j] = fold(s[8 * h + j]);
    for (int j = 0; j < 4; j++)
      b[j] = MIX(a[2 * j], a[2 * j + 1], 0, 8, 2, 10, 4, 12, 6, 14)
           + MIX(a[2 * j], a[2 * j + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    for (int j = 0; j < 2; j++)
      c[j] = MIX(b[2 * j], b[2 * j + 1], 0, 1, 8, 9, 4, 5, 12, 13)
           + MIX(b[2 * j], b[2 * j + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    out[h] = MIX(c[0], c[1], 0, 1, 2, 3, 8, 9, 10, 11) + MIX(c[0], c[1], 4, 5, 6, 7, 12, 13, 14, 15);
  }
  f32x16 v;
  memcpy(&v, out, sizeof v);
  return v;
}
/* rows of x, and of W for each of them, that the registers hold sums for */
#if defined(__AVX512F__)
#define MOST_ROWS 6
#define ROWS_OF_W(R) ((R) <= 3 ? 8 : 4)
#else
#define MOST_ROWS 2
#define ROWS_OF_W(R) ((R) <= 1 ? 4 : 2)
#endif
#endif
"""


def function(spec: DenseLinearSpec) -> str:
    """`dense_linear_<key>` on blocks of 16 output channels, first to last of (N + 15) / 16.

    `w2` is the second matrix [N, K] of a paired kernel (w + N K when both are one tensor), null otherwise;
    the operands of the epilogue follow y.
    """
    names = operands(spec.epilogue)
    takes = "".join(f", const float *RESTRICT {name}" for name in names)
    gives = "".join(f", {name}" for name in names)
    chain = list(spec.epilogue)
    lines = [f"a = {EPILOGUES[name].c};" for name in chain]
    if spec.paired:
        lines.insert(1, "a = a * second[r];")
    steps = "\n".join(f"    {line}" for line in lines)
    second = (
        f"  f32x16 second[MOST_ROWS];\n  sixteen_{spec.key}(R, x + m0 * K, w2, n, N, K, second);\n"
        if spec.paired
        else ""
    )
    return f"""{STORED}{REDUCE}
/* 16 results of R rows of x: rows n to n + 15 of W, C at a time; past the last row it is read again */
INLINE void sixteen_{spec.key}(const int R, const float *RESTRICT x, const stored_{spec.weight} *RESTRICT w,
    long n, long N, long K, f32x16 *out) {{
  enum {{ MOST = 8 }};
  const int C = ROWS_OF_W(R);
  f32x16 s[MOST_ROWS][16];
  for (int c0 = 0; c0 < 16; c0 += C) {{
    const stored_{spec.weight} *row[MOST];
    f32x16 acc[MOST_ROWS][MOST];
    for (int c = 0; c < C; c++) row[c] = w + (n + c0 + c < N ? n + c0 + c : N - 1) * K;
    for (int r = 0; r < R; r++) for (int c = 0; c < C; c++) acc[r][c] = all(0.0f);
    long k = 0;
    for (; k + 16 <= K; k += 16) {{
      f32x16 a[MOST_ROWS];
      for (int r = 0; r < R; r++) a[r] = load(x + r * K + k);
      for (int c = 0; c < C; c++) {{
        const f32x16 b = load_{spec.weight}(row[c] + k);
        for (int r = 0; r < R; r++) acc[r][c] += a[r] * b;
      }}
    }}
    if (k < K)
      for (int c = 0; c < C; c++) {{
        const f32x16 b = take_{spec.weight}(row[c] + k, K - k);
        for (int r = 0; r < R; r++) acc[r][c] += take(x + r * K + k, K - k) * b;
      }}
    for (int r = 0; r < R; r++) for (int c = 0; c < C; c++) s[r][c0 + c] = acc[r][c];
  }}
  for (int r = 0; r < R; r++) out[r] = sums_of(s[r]);
}}

INLINE void rows_{spec.key}(const int R, long m0, long n, const float *RESTRICT x,
    const stored_{spec.weight} *RESTRICT w, const stored_{spec.weight} *RESTRICT w2,
    float *RESTRICT y{takes}, long N, long K) {{
  const long count = N - n;
  f32x16 first[MOST_ROWS];
  sixteen_{spec.key}(R, x + m0 * K, w, n, N, K, first);
{second}  for (int r = 0; r < R; r++) {{
    const long m = m0 + r;
    f32x16 a = first[r];
{steps}
    give(y + m * N + n, a, count);
  }}
}}

static void dense_linear_{spec.key}(const float *RESTRICT x, const stored_{spec.weight} *RESTRICT w,
    const stored_{spec.weight} *RESTRICT w2, float *RESTRICT y{takes},
    long M, long N, long K, long first, long last) {{
  for (long n = first * {BLOCK}; n < last * {BLOCK}; n += {BLOCK}) {{
    long m = 0;
    for (; m + MOST_ROWS <= M; m += MOST_ROWS) rows_{spec.key}(MOST_ROWS, m, n, x, w, w2, y{gives}, N, K);
    switch (M - m) {{
#if MOST_ROWS > 2
      case 5: rows_{spec.key}(5, m, n, x, w, w2, y{gives}, N, K); break;
      case 4: rows_{spec.key}(4, m, n, x, w, w2, y{gives}, N, K); break;
      case 3: rows_{spec.key}(3, m, n, x, w, w2, y{gives}, N, K); break;
      case 2: rows_{spec.key}(2, m, n, x, w, w2, y{gives}, N, K); break;
#endif
      case 1: rows_{spec.key}(1, m, n, x, w, w2, y{gives}, N, K); break;
    }}
  }}
}}
"""


FIELDS = {
    "x": "const float *",
    "w": "const void *",
    "w2": "const void *",
    "y": "float *",
    "M": "long",
    "N": "long",
    "K": "long",
}


@cache
def emit(spec: DenseLinearSpec) -> str:
    """The self-contained file; the operands of the epilogue follow K."""
    names = operands(spec.epilogue)
    work = (
        f"  const long blocks = (a->N + {BLOCK - 1}) / {BLOCK};\n"
        f"  dense_linear_{spec.key}(a->x, a->w, a->w2, a->y{''.join(f', a->{name}' for name in names)}, "
        "a->M, a->N, a->K,\n    blocks * member / members, blocks * (member + 1) / members);"
    )
    return self_contained(spec, function(spec), FIELDS | dict.fromkeys(names, "const float *"), work)
