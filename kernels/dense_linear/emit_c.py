"""dense_linear in C: vectors along K, rows of W side by side, 16 sums turned into one vector of results.

The limit of one row of x is reading W once: eight rows of W at a time are eight streams and eight chains of
sums. With more rows of x each loaded vector of W serves them all.
"""

from __future__ import annotations

from functools import cache

from effc.kernels.cpu.entry import self_contained
from effc.kernels.cpu.parts import PARTS
from effc.kernels.cpu.stored import STORED, Stored
from effc.kernels.dense_linear import panels_c
from effc.kernels.dense_linear.spec import BLOCK, DenseLinearSpec
from effc.kernels.epilogue import EPILOGUES, operands

MANY = 64
"""From this many rows on panels are laid out; proved bit-equal, so not in the spec."""

TILES = (
    PARTS
    + r"""
#ifndef TILES
#define TILES
/* rows of x, and rows of W for each of them, that the registers hold sums for */
#if defined(__AVX512F__)
#define MOST_ROWS 6
#define ROWS_OF_W(R) ((R) <= 3 ? 8 : 4)
#elif defined(__AVX2__)
#define MOST_ROWS 3
#define ROWS_OF_W(R) ((R) <= 1 ? 4 : 2)
#else
#define MOST_ROWS 2
#define ROWS_OF_W(R) ((R) <= 1 ? 2 : 1)
#endif
typedef float f32x8 __attribute__((vector_size(32)));
#if defined(__clang__)
#define MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t i32x8 __attribute__((vector_size(32)));
#define MIX(a, b, ...) __builtin_shuffle(a, b, (i32x8){__VA_ARGS__})
#endif
INLINE f32x8 fold(const float *s) {
  f32x8 half[2];
  memcpy(half, s, sizeof half);
  return half[0] + half[1];
}
/* lane j = sum of s[j]; always in the same order */
INLINE f32x16 sums_of(const float s[16][16]) {
  f32x8 out[2];
  for (int h = 0; h < 2; h++) {
    f32x8 a[8], b[4], c[2];
    UNROLL for (int j = 0; j < 8; j++) a[j] = fold(s[8 * h + j]);
    UNROLL for (int j = 0; j < 4; j++)
      b[j] = MIX(a[2 * j], a[2 * j + 1], 0, 8, 2, 10, 4, 12, 6, 14)
           + MIX(a[2 * j], a[2 * j + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    UNROLL for (int j = 0; j < 2; j++)
      c[j] = MIX(b[2 * j], b[2 * j + 1], 0, 1, 8, 9, 4, 5, 12, 13)
           + MIX(b[2 * j], b[2 * j + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    out[h] = MIX(c[0], c[1], 0, 1, 2, 3, 8, 9, 10, 11) + MIX(c[0], c[1], 4, 5, 6, 7, 12, 13, 14, 15);
  }
  f32x16 v;
  memcpy(&v, out, sizeof v);
  return v;
}
#endif
"""
)


def _sums(kind: Stored) -> str:
    """Sixteen results of a few rows of x, without an epilogue: one text for all kernels of a stored type."""
    line = 16 if kind == "float32" else 32  # columns in 64 bytes, the unit in which memory is read
    odd = f"if (k + 16 <= end) {{ step_{kind}(R, C, x, row, k, K, acc); k += 16; }}" if line > 16 else ""
    return f"""
#ifndef SIXTEEN_{kind}
#define SIXTEEN_{kind}
/* acc[r][c] += x[r] w[c] over columns k to k + 16 of R rows of x and C of W */
INLINE void step_{kind}(const int R, const int C, const float *x, const stored_{kind} *const *row,
    long k, long K, part acc[MOST_ROWS][8][PARTS]) {{
  UNROLL for (int p = 0; p < PARTS; p++) {{
    part a[MOST_ROWS];
    UNROLL for (int r = 0; r < R; r++) a[r] = part_float32(x + r * K + k + LANES * p);
    UNROLL for (int c = 0; c < C; c++) {{
      part b = part_{kind}(row[c] + k + LANES * p);
      if (R > 1) LOADED(b);
      UNROLL for (int r = 0; r < R; r++) acc[r][c][p] += a[r] * b;
    }}
  }}
}}

/* R rows of x times rows n to n + 15 of W, C at a time; past the last row of W it is read again. With many
   rows of x columns go in chunks, so that the rows stay near; sums go on in the same order */
INLINE void tile_{kind}(const int R, const float *RESTRICT x, const stored_{kind} *RESTRICT w,
    long n, long N, long K, f32x16 *RESTRICT out) {{
  const int C = ROWS_OF_W(R);
  const long whole = K / 16 * 16, chunk = R > 3 ? 512 : whole;
  float s[MOST_ROWS][16][16] = {{{{{{0}}}}}};
  for (long from = 0; from < whole; from += chunk)
    for (int c0 = 0; c0 < 16; c0 += C) {{
      const long end = from + chunk < whole ? from + chunk : whole;
      const stored_{kind} *row[8];
      part acc[MOST_ROWS][8][PARTS];
      UNROLL for (int c = 0; c < C; c++) row[c] = w + (n + c0 + c < N ? n + c0 + c : N - 1) * K;
      UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++) memcpy(acc[r][c], s[r][c0 + c], sizeof acc[r][c]);
      long k = from;
      for (; k + {line} <= end; k += {line}) {{
        if (R <= 3) UNROLL for (int c = 0; c < C; c++) __builtin_prefetch(row[c] + C * K + k);
        UNROLL for (int u = 0; u < {line}; u += 16) step_{kind}(R, C, x, row, k + u, K, acc);
      }}
      {odd}
      UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++) memcpy(s[r][c0 + c], acc[r][c], sizeof acc[r][c]);
    }}
  if (whole < K)
    for (int c = 0; c < 16; c++) {{
      const f32x16 b = take_{kind}(w + (n + c < N ? n + c : N - 1) * K + whole, K - whole);
      for (int r = 0; r < R; r++)
        store(s[r][c], load(s[r][c]) + take(x + r * K + whole, K - whole) * b);
    }}
  for (int r = 0; r < R; r++) out[r] = sums_of(s[r]);
}}

static __attribute__((noinline)) void sixteen_{kind}(long rows, const float *RESTRICT x,
    const stored_{kind} *RESTRICT w, long n, long N, long K, f32x16 *RESTRICT out) {{
  switch (rows) {{
#if MOST_ROWS > 3
    case 6: tile_{kind}(6, x, w, n, N, K, out); break;
    case 5: tile_{kind}(5, x, w, n, N, K, out); break;
    case 4: tile_{kind}(4, x, w, n, N, K, out); break;
#endif
#if MOST_ROWS > 2
    case 3: tile_{kind}(3, x, w, n, N, K, out); break;
#endif
    case 2: tile_{kind}(2, x, w, n, N, K, out); break;
    default: tile_{kind}(1, x, w, n, N, K, out);
  }}
}}
#endif
"""


def function(spec: DenseLinearSpec) -> str:
    """`dense_linear_<key>` on blocks of 16 output channels, first to last of (N + 15) / 16.

    `w2` is the second matrix [N, K] of a paired kernel (w + N K when both are one tensor), null otherwise;
    the operands of the epilogue follow y.
    """
    kind = spec.weight
    takes = "".join(f", const float *RESTRICT {name}" for name in operands(spec.epilogue))
    lines = [f"a = {EPILOGUES[name].c};" for name in spec.epilogue]
    gives = "".join(f", {name}" for name in operands(spec.epilogue))
    by_panels = panels_c.function(spec, takes, lines)
    second = ""
    if spec.paired:
        lines.insert(1, "a = a * second[r];")
        second = (
            f"\n      f32x16 second[MOST_ROWS];\n      sixteen_{kind}(rows, x + m0 * K, w2, n, N, K, second);"
        )
    steps = "".join(f"\n        {line}" for line in lines)
    return f"""{STORED}{TILES}{_sums(kind)}{by_panels}
static void dense_linear_{spec.key}(const float *RESTRICT x, const stored_{kind} *RESTRICT w,
    const stored_{kind} *RESTRICT w2, float *RESTRICT y{takes},
    long M, long N, long K, long first, long last) {{
  if (M >= {MANY} && panels_{spec.key}(x, w, w2, y{gives}, M, N, K, first, last)) return;
  for (long n = first * {BLOCK}; n < last * {BLOCK}; n += {BLOCK}) {{
    const long count = N - n;
    for (long m0 = 0; m0 < M; m0 += MOST_ROWS) {{
      const long rows = M - m0 < MOST_ROWS ? M - m0 : MOST_ROWS;
      f32x16 sums[MOST_ROWS];
      sixteen_{kind}(rows, x + m0 * K, w, n, N, K, sums);{second}
      for (long r = 0; r < rows; r++) {{
        const long m = m0 + r;
        f32x16 a = sums[r];{steps}
        give(y + m * N + n, a, count);
      }}
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
