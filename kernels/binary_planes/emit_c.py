"""binary_planes in C: sums of four activations with every sign in a vector, looked up by four bits of a row.

For four columns there are 16 sums of +-x; they are the lanes of one vector, so that one instruction looks up
those of 16 rows. Lookups, additions and shifts are all that remains of the product.
"""

from __future__ import annotations

from functools import cache

from effc.kernels.binary_planes.spec import BLOCK, STRIDE, BinaryPlanesSpec
from effc.kernels.cpu.entry import self_contained
from effc.kernels.epilogue import EPILOGUES, operands

QUADS = STRIDE // 4
LOOKUP = r"""
#ifndef LOOKUP
#define LOOKUP
/* lane i = table[words[i] % 16] */
INLINE f32x16 lookup(f32x16 table, u32x16 words) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_permutexvar_ps((__m512i)words, (__m512)table);
#elif defined(__AVX2__)
  __m256 half[2], out[2];
  __m256i index[2];
  memcpy(half, &table, sizeof table);
  memcpy(index, &words, sizeof words);
  for (int i = 0; i < 2; i++) {
    __m256 low = _mm256_permutevar8x32_ps(half[0], index[i]);
    __m256 high = _mm256_permutevar8x32_ps(half[1], index[i]);
    out[i] = _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index[i], 28)));
  }
  f32x16 v; memcpy(&v, out, sizeof v);
  return v;
#else
  f32x16 v;
  for (int i = 0; i < 16; i++) v[i] = table[words[i] & 15];
  return v;
#endif
}
INLINE u32x16 load_words(const uint32_t *p) { u32x16 v; memcpy(&v, p, sizeof v); return v; }
/* all 16 sums of four numbers with signs; bit b of a lane's number says + of number b */
INLINE f32x16 sums_with_signs(const float *x) {
  const f32x16 s0 = {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1};
  const f32x16 s1 = {-1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1};
  const f32x16 s2 = {-1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1};
  const f32x16 s3 = {-1, -1, -1, -1, -1, -1, -1, -1, 1, 1, 1, 1, 1, 1, 1, 1};
  return (s0 * x[0] + s1 * x[1]) + (s2 * x[2] + s3 * x[3]);
}
/* 2^e, 0 for e = -128 */
INLINE float power(int8_t e) {
  uint32_t bits = e == -128 ? 0 : (uint32_t)(e + 127) << 23;
  float v; memcpy(&v, &bits, 4);
  return v;
}
INLINE f32x16 powers(const int8_t *p) {
  i8x16 b; memcpy(&b, p, sizeof b);
  i32x16 e = __builtin_convertvector(b, i32x16);
  return (f32x16)((u32x16)((e + 127) << 23) & (u32x16)(e != -128));
}
INLINE float half_float(const uint16_t *p) {
  uint16_t row[16] = {0};
  row[0] = *p;
  return load_f16(row)[0];
}
#endif
"""


def function(spec: BinaryPlanesSpec) -> str:
    """Two functions, with a meeting of the members between them, for one row of x.

    `tables_<key>`: quads first to last of tables, each of 16 sums; `binary_planes_<key>`: blocks of 64 rows
    of W first to last -> y.
    """
    takes = "".join(f", const float *RESTRICT {name}" for name in operands(spec.epilogue))
    body = _columns(spec) if spec.side == "columns" else _rows(spec)
    chain = "\n".join(f"      a = {EPILOGUES[name].c};" for name in spec.epilogue)
    return f"""{LOOKUP}
{_tables(spec)}
static void binary_planes_{spec.key}(const float *RESTRICT tables, const uint32_t *RESTRICT words,
    const {_kind(spec)} *RESTRICT scales, float *RESTRICT y{takes}, long m, long N, long K,
    long first, long last) {{
  const long strides = (K + {STRIDE - 1}) / {STRIDE};
  for (long block = first; block < last; block++) {{
    const uint32_t *w = words + block * strides * {spec.planes * BLOCK};
    f32x16 f[4] = {{{{0}}}};
{body}
    for (int v = 0; v < 4; v++) {{
      const long n = block * {BLOCK} + 16 * v, count = N - n < 16 ? N - n : 16;
      if (count <= 0) break;
      f32x16 a = f[v];
{chain}
      give(y + m * N + n, a, count);
    }}
  }}
}}
"""


def _kind(spec: BinaryPlanesSpec) -> str:
    return "uint16_t" if spec.scale == "float16" else "int8_t"


def _tables(spec: BinaryPlanesSpec) -> str:
    """Sums for four columns: of x alone, or of x times the scales of a plane and a run of rows."""
    if spec.side == "rows":
        scaled, which = "x[k]", ""
    else:
        which = f"const long of = q / quads, p = of % {spec.planes}, run = of / {spec.planes};"
        each = " + ".join(
            f"power(scales[((p * {spec.terms} + {t}) * runs + run) * K + k])" for t in range(spec.terms)
        )
        each = each if spec.scale == "pow2" else "half_float(scales + (p * runs + run) * K + k)"
        scaled = f"x[k] * ({each})"
    return f"""
static void tables_{spec.key}(const float *RESTRICT x, const {_kind(spec)} *RESTRICT scales, long runs,
    float *RESTRICT tables, long K, long first, long last) {{
  const long quads = (K + {STRIDE - 1}) / {STRIDE} * {QUADS};
  for (long q = first; q < last; q++) {{
    {which}
    float four[4] = {{0}};
    for (int b = 0; b < 4; b++) {{
      const long k = 4 * (q % quads) + b;
      if (k < K) four[b] = {scaled};
    }}
    store(tables + 16 * q, sums_with_signs(four));
  }}
}}
"""


def _stride(into: str, table: str, indent: str) -> str:
    """The 32 columns of a word for 64 rows."""
    return f"""{indent}u32x16 bits[4];
{indent}for (int v = 0; v < 4; v++) bits[v] = load_words(w + 16 * v);
{indent}for (int s = 0; s < {QUADS}; s++) {{
{indent}  const f32x16 sums = load({table} + 16 * s);
{indent}  for (int v = 0; v < 4; v++) {{ {into}[v] += lookup(sums, bits[v]); bits[v] >>= 4; }}
{indent}}}
{indent}w += {BLOCK};"""


def _columns(spec: BinaryPlanesSpec) -> str:
    run = f"block * {BLOCK} / {spec.share}" if spec.share else "0"
    return f"""    const float *t = tables + {run} * {spec.planes} * strides * {QUADS * 16};
    for (long k = 0; k < strides; k++)
      for (int p = 0; p < {spec.planes}; p++) {{
        const float *at = t + (p * strides + k) * {QUADS * 16};
{_stride("f", "at", "        ")}
      }}"""


def _rows(spec: BinaryPlanesSpec) -> str:
    per = spec.planes * spec.terms * BLOCK
    values = (
        f"load_f16(a + p * {BLOCK} + 16 * v)"
        if spec.scale == "float16"
        else " + ".join(f"powers(a + (p * {spec.terms} + {t}) * {BLOCK} + 16 * v)" for t in range(spec.terms))
    )
    width = f"{spec.share // STRIDE}" if spec.share else "strides"
    return f"""    const long width = {width}, groups = strides / width;
    for (long g = 0; g < groups; g++) {{
      const {_kind(spec)} *a = scales + (block * groups + g) * {per};
      f32x16 sum[{spec.planes}][4] = {{{{{{0}}}}}};
      for (long k = g * width; k < (g + 1) * width; k++)
        for (int p = 0; p < {spec.planes}; p++) {{
          const float *at = tables + k * {QUADS * 16};
{_stride("sum[p]", "at", "          ")}
        }}
      for (int p = 0; p < {spec.planes}; p++)
        for (int v = 0; v < 4; v++) f[v] += sum[p][v] * ({values});
    }}"""


FIELDS = {
    "x": "const float *",
    "words": "const uint32_t *",
    "scales": "const void *",
    "tables": "float *",
    "y": "float *",
    "M": "long",
    "N": "long",
    "K": "long",
    "runs": "long",
}


@cache
def emit(spec: BinaryPlanesSpec) -> str:
    """The self-contained file; rows of x come one after another, on one set of tables."""
    names = operands(spec.epilogue)
    gives = "".join(f", a->{name}" for name in names)
    sets = f"a->runs * {spec.planes}" if spec.side == "columns" else "1"
    work = f"""  const long quads = {sets} * ((a->K + {STRIDE - 1}) / {STRIDE} * {QUADS});
  const long blocks = (a->N + {BLOCK - 1}) / {BLOCK};
  for (long m = 0; m < a->M; m++) {{
    tables_{spec.key}(a->x + m * a->K, a->scales, a->runs, a->tables, a->K,
                      quads * member / members, quads * (member + 1) / members);
    a->team->meet(members);
    binary_planes_{spec.key}(a->tables, a->words, a->scales, a->y{gives}, m, a->N, a->K,
                             blocks * member / members, blocks * (member + 1) / members);
    a->team->meet(members);
  }}"""
    fields = FIELDS | dict.fromkeys(names, "const float *")
    return self_contained(spec, function(spec), fields, work)


def table_numbers(spec: BinaryPlanesSpec, runs: int, k: int) -> int:
    """Floats of the tables of one row of x."""
    sets = runs * spec.planes if spec.side == "columns" else 1
    return sets * -(-k // STRIDE) * QUADS * 16
