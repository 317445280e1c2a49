"""binary_planes in C: sums of four activations with every sign in a vector, looked up by four bits of a row.

For four columns there are 16 sums of +-x; they are the lanes of one vector, so that one instruction looks up
those of 16 rows. Lookups, additions and shifts are all that remains of the product. The sums are made
where they are used and never stored; several blocks of rows share them. With side = columns scales go into x,
so that each plane has sums of its own.
"""

from __future__ import annotations

from functools import cache

from effc.kernels.binary_planes.spec import BLOCK, STRIDE, BinaryPlanesSpec
from effc.kernels.cpu.entry import self_contained
from effc.kernels.epilogue import EPILOGUES, operands

QUADS = STRIDE // 4
SEVERAL, OF_ROWS = 4, {1: 2, 2: 2, 3: 1, 4: 1}
"""Blocks that share sums where registers hold theirs, with side = rows by planes; proved bit-equal to one
alone, so not in the spec."""
LOOKUP = r"""
#ifndef LOOKUP
#define LOOKUP
#define EVERY _Pragma("GCC unroll 16")
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
INLINE f32x16 powers(const int8_t *p) {
  i8x16 b; memcpy(&b, p, sizeof b);
  i32x16 e = __builtin_convertvector(b, i32x16);
  return (f32x16)((u32x16)((e + 127) << 23) & (u32x16)(e != -128));
}
/* the first of 16 numbers, as many as there are */
INLINE f32x16 some(const float *p, long count) { return count > 0 ? take(p, count) : all(0.0f); }
#endif
"""


def function(spec: BinaryPlanesSpec) -> str:
    """`binary_planes_<key>` on blocks of 64 rows of W first to last, for M rows of x."""
    names = operands(spec.epilogue)
    takes = "".join(f", const float *RESTRICT {name}" for name in names)
    gives = "".join(f", {name}" for name in names)
    given, body = f"x, words, scales, y{gives}, N, K", _columns if spec.side == "columns" else _rows
    several = SEVERAL if spec.side == "columns" else OF_ROWS[spec.planes]
    each = f"for (long m = 0; m < M; m++) blocks1_{spec.key}(m, block, {given}, runs);"
    if several == 1:
        return f"""{LOOKUP}{body(spec, 1, takes)}
{_begin(spec, takes)}
  for (long block = first; block < last; block++)
    {each}
}}
"""
    same = ""
    if spec.share and spec.side == "columns":
        same = f" && (block + {several - 1}) * {BLOCK} / {spec.share} == block * {BLOCK} / {spec.share}"
    return f"""{LOOKUP}{body(spec, 1, takes)}
#if defined(__AVX512F__)   /* where the registers hold the sums of several blocks */
{body(spec, several, takes)}
#endif
{_begin(spec, takes)}
  for (long block = first; block < last; block++) {{
#if defined(__AVX512F__)
    if (block + {several} <= last{same}) {{
      for (long m = 0; m < M; m++) blocks{several}_{spec.key}(m, block, {given}, runs);
      block += {several - 1};
      continue;
    }}
#endif
    {each}
  }}
}}
"""


def _begin(spec: BinaryPlanesSpec, takes: str) -> str:
    return f"""static void binary_planes_{spec.key}(
    const float *RESTRICT x, const uint32_t *RESTRICT words, const {_kind(spec)} *RESTRICT scales,
    float *RESTRICT y{takes}, long M, long N, long K, long runs, long first, long last) {{"""


def _kind(spec: BinaryPlanesSpec) -> str:
    return "uint16_t" if spec.scale == "float16" else "int8_t"


def _one(spec: BinaryPlanesSpec, blocks: int, takes: str) -> str:
    """The head of the function of one row of x and some blocks, and where it stands in them."""
    return f"""
static void blocks{blocks}_{spec.key}(long m, long block,
    const float *RESTRICT x, const uint32_t *RESTRICT words, const {_kind(spec)} *RESTRICT scales,
    float *RESTRICT y{takes}, long N, long K, long runs) {{
  const long strides = (K + {STRIDE - 1}) / {STRIDE}, apart = strides * {spec.planes * BLOCK};
  const uint32_t *w = words + block * apart;
  x += m * K;
  f32x16 f[{4 * blocks}];
  EVERY for (int v = 0; v < {4 * blocks}; v++) f[v] = all(0.0f);"""


def _columns(spec: BinaryPlanesSpec, blocks: int, takes: str) -> str:
    """Scales go into x, plane by plane; blocks of one run of rows have the same sums."""
    run = f"block * {BLOCK} / {spec.share}" if spec.share else "0"
    at = f"(p * {spec.terms} + {{term}}) * runs * padded + 16 * i"
    load = "load_f16" if spec.scale == "float16" else "powers"
    value = " + ".join(f"{load}(a + {at.format(term=term)})" for term in range(spec.terms))
    return f"""{_one(spec, blocks, takes)}
  const long padded = strides * {STRIDE};
  const {_kind(spec)} *a = scales + {run} * padded;
  for (long k = 0; k < K; k += {STRIDE}, a += {STRIDE}) {{
    const f32x16 own[2] = {{some(x + k, K - k), some(x + k + 16, K - k - 16)}};
    for (int p = 0; p < {spec.planes}; p++, w += {BLOCK}) {{
      float scaled[{STRIDE}];
      EVERY for (int i = 0; i < 2; i++) store(scaled + 16 * i, own[i] * ({value}));
      EVERY for (int s = 0; s < {QUADS}; s++) {{
        const f32x16 sums = sums_with_signs(scaled + 4 * s);
        EVERY for (int v = 0; v < {4 * blocks}; v++)
          f[v] += lookup(sums, load_words(w + v / 4 * apart + v % 4 * 16) >> 4 * s);
      }}
    }}
  }}
{_finish(spec, blocks)}
}}
"""


def _rows(spec: BinaryPlanesSpec, blocks: int, takes: str) -> str:
    """Scales multiply the sums of a plane, so that all planes look up the same."""
    per, vectors = spec.planes * spec.terms * BLOCK, 4 * blocks
    load = "load_f16" if spec.scale == "float16" else "powers"
    values = " + ".join(
        f"{load}(a + v / 4 * groups * {per} + (p * {spec.terms} + {term}) * {BLOCK} + v % 4 * 16)"
        for term in range(spec.terms)
    )
    width = f"{spec.share}L" if spec.share else "K"
    return f"""{_one(spec, blocks, takes)}
  const long width = {width}, groups = K / width;
  for (long g = 0; g < groups; g++) {{
    const {_kind(spec)} *a = scales + (block * groups + g) * {per};
    f32x16 sum[{spec.planes}][{vectors}];
    EVERY for (int p = 0; p < {spec.planes}; p++)
      EVERY for (int v = 0; v < {vectors}; v++) sum[p][v] = all(0.0f);
    for (long k = g * width; k < (g + 1) * width; k += {STRIDE}, w += {spec.planes * BLOCK}) {{
      float own[{STRIDE}];
      EVERY for (int i = 0; i < 2; i++) store(own + 16 * i, some(x + k + 16 * i, K - k - 16 * i));
      EVERY for (int s = 0; s < {QUADS}; s++) {{
        const f32x16 sums = sums_with_signs(own + 4 * s);
        EVERY for (int p = 0; p < {spec.planes}; p++)
          EVERY for (int v = 0; v < {vectors}; v++)
            sum[p][v] += lookup(sums, load_words(w + v / 4 * apart + p * {BLOCK} + v % 4 * 16) >> 4 * s);
      }}
    }}
    EVERY for (int p = 0; p < {spec.planes}; p++)
      EVERY for (int v = 0; v < {vectors}; v++) f[v] += sum[p][v] * ({values});
  }}
{_finish(spec, blocks)}
}}
"""


def _finish(spec: BinaryPlanesSpec, blocks: int) -> str:
    """The epilogue on each vector, then the store."""
    lines = [
        f"EVERY for (int v = 0; v < {4 * blocks}; v++) {{",
        f"  const long n = block * {BLOCK} + 16 * v, count = N - n < 16 ? N - n : 16;",
        "  if (count <= 0) break;",
        "  f32x16 a = f[v];",
        *(f"  a = {EPILOGUES[name].c};" for name in spec.epilogue),
        "  give(y + m * N + n, a, count);",
        "}",
    ]
    return "\n".join("  " + line for line in lines)


FIELDS = {
    "x": "const float *",
    "words": "const uint32_t *",
    "scales": "const void *",
    "y": "float *",
    "M": "long",
    "N": "long",
    "K": "long",
    "runs": "long",
}


@cache
def emit(spec: BinaryPlanesSpec) -> str:
    """The self-contained file; operands of the epilogue come last."""
    names = operands(spec.epilogue)
    gives = "".join(f", a->{name}" for name in names)
    work = f"""  const long blocks = (a->N + {BLOCK - 1}) / {BLOCK};
  binary_planes_{spec.key}(a->x, a->words, a->scales, a->y{gives}, a->M, a->N, a->K, a->runs,
                           blocks * member / members, blocks * (member + 1) / members);"""
    fields = FIELDS | dict.fromkeys(names, "const float *")
    return self_contained(spec, function(spec), fields, work)
