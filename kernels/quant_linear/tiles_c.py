"""quant_linear on matrix units (AMX): 16 rows of x times 16 channels and 64 columns in one instruction.

The codes of a block are unpacked once for all rows, minus the middle when symmetric. Sums of a group are the
same integers as those of the vectors, and what follows them is the same arithmetic in the same order, so the
results have the same bits. That arithmetic takes longer than the products: 16 vectors of float sums stay in
registers while the groups of 16 channels go by, and 16 rows of x stay near for all channels of a block.

Where there are no matrix units and `TILES_IN_C` is defined, plain C stands for the instructions: a sanitizer
sees every byte that they would touch.
"""

from __future__ import annotations

from math import gcd

from effc.kernels.epilogue import EPILOGUES
from effc.kernels.quant_linear import planes
from effc.kernels.quant_linear.spec import QuantLinearSpec

TILES = r"""
#include <stdlib.h>
#if (defined(__AMX_INT8__) || defined(TILES_IN_C)) && !defined(TILE_LOAD)
/* tiles 0 and 1 hold sums in turns, 4 holds rows of x, 5 codes */
struct tiles { uint8_t palette, start, rest[14]; uint16_t bytes[16]; uint8_t rows[16]; };
#if defined(__AMX_INT8__) && !defined(TILES_IN_C)
INLINE void tiles_of(long rows, long columns) {
  struct tiles t = {.palette = 1};
  for (int i = 0; i < 2; i++) { t.bytes[i] = 64; t.rows[i] = rows; }
  t.bytes[4] = columns; t.rows[4] = rows;
  t.bytes[5] = 64; t.rows[5] = columns / 4;
  __asm__ volatile("ldtilecfg %0" :: "m"(t));
}
#define TILES_DONE() __asm__ volatile("tilerelease" ::)
#define TILE_LOAD(t, p, by) \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t :: "r"(p), "r"((long)(by)) : "memory")
#define TILE_STORE(t, p) __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" :: "r"(p), "r"(64L) : "memory")
#define TILE_ZERO(t) __asm__ volatile("tilezero %%tmm" #t ::)
#define TILE_DOT_I(t) __asm__ volatile("tdpbssd %%tmm5, %%tmm4, %%tmm" #t ::)   /* codes signed */
#define TILE_DOT_U(t) __asm__ volatile("tdpbsud %%tmm5, %%tmm4, %%tmm" #t ::)   /* codes unsigned */
#else
static __thread struct { long rows, columns; int32_t sum[2][16][16]; uint8_t byte[2][16][64]; } tile_;
static void tiles_of(long rows, long columns) { tile_.rows = rows; tile_.columns = columns; }
static void tile_load_(int t, const void *from, long by) {
  const long rows = t == 5 ? tile_.columns / 4 : tile_.rows, bytes = t == 4 ? tile_.columns : 64;
  for (long r = 0; r < rows; r++)
    for (long i = 0; i < bytes; i++) {
      const uint8_t b = ((const uint8_t *)from)[r * by + i];
      if (t < 4) ((uint8_t *)tile_.sum[t][r])[i] = b; else tile_.byte[t - 4][r][i] = b;
    }
}
static void tile_store_(int t, void *to) {
  for (long r = 0; r < tile_.rows; r++)
    for (int i = 0; i < 16; i++) ((int32_t *)to)[16 * r + i] = tile_.sum[t][r][i];
}
static void tile_dot_(int t, int is_signed) {
  for (long r = 0; r < tile_.rows; r++)
    for (long k = 0; k < tile_.columns; k++)
      for (int i = 0; i < 16; i++) {
        const uint8_t code = tile_.byte[1][k / 4][4 * i + k % 4];
        tile_.sum[t][r][i] += (int8_t)tile_.byte[0][r][k] * (is_signed ? (int8_t)code : code);
      }
}
#define TILES_DONE() ((void)0)
#define TILE_LOAD(t, p, by) tile_load_(t, p, by)
#define TILE_STORE(t, p) tile_store_(t, p)
#define TILE_ZERO(t) memset(tile_.sum[t], 0, sizeof tile_.sum[t])
#define TILE_DOT_I(t) tile_dot_(t, 1)
#define TILE_DOT_U(t) tile_dot_(t, 0)
#endif
/* d + z x: x of 32 bits for all lanes; in one instruction where both have 16 bits */
INLINE i32x16 less_zero(i32x16 d, i32x16 z, const int32_t *x, const int narrow) {
#if defined(__AVX512VNNI__)
  if (narrow) return (i32x16)_mm512_dpwssd_epi32((__m512i)d, (__m512i)(z & 0xffff), _mm512_set1_epi32(*x));
#endif
  return d + z * *x;
}
#endif
"""


def step(spec: QuantLinearSpec) -> int:
    """Columns that one instruction takes."""
    return gcd(spec.group, 64) if spec.group else 64


def fits(spec: QuantLinearSpec) -> str:
    """C expression: whether a group is made of whole steps (as emit_c.by_units has it)."""
    return "1" if spec.group else f"K % {step(spec)} == 0"


def function(spec: QuantLinearSpec, takes: str) -> str:
    """`tiles_<key>` over blocks first to last, in the place of the vectors' tiles; 1 when it did them."""
    by, key = 2 if spec.paired else 1, spec.key
    size = f"{planes.head(spec)}L + width * {64 * spec.bits // 8}"
    dot = "TILE_DOT_I" if spec.symmetric else "TILE_DOT_U"
    narrow = int(0 < spec.group <= 256)
    zero = "" if spec.symmetric else "\n    const i32x16 zero = -widen(p + 128 + 16 * v);"
    exact = "e[r]" if spec.symmetric else f"less_zero(e[r], zero, sums + 16 * g + r, {narrow})"
    return f"""
#if defined(TILE_LOAD){_unpack(spec, size)}
/* out = results of H rows, of which a is the first, for the 16 channels of vector v; their scales and sums of
   bytes lie side by side, their codes are unpacked */
INLINE void rows_{key}(const int H, const int8_t *RESTRICT a, const float *RESTRICT scales,
    const int32_t *RESTRICT sums, const uint8_t *p, const uint8_t *RESTRICT codes, long v, long K,
    const uint8_t *next, f32x16 *RESTRICT out) {{
  const long width = WIDTH(K), groups = K / width, size = {size};
  i32x16 d[2][16] = {{{{{{0}}}}}};
  f32x16 f[16];
  UNROLL for (int r = 0; r < H; r++) f[r] = all(0.0f);
  for (long g = 0; g < groups; g++, p += size) {{
#define SUMS(T) \\
    TILE_ZERO(T); \\
    for (long s = 0; s < width; s += {step(spec)}, a += {step(spec)}, codes += {16 * step(spec)}) {{ \\
      TILE_LOAD(4, a, K); TILE_LOAD(5, codes, 64); {dot}(T); \\
    }} \\
    TILE_STORE(T, d[T]);
    if (g % 2) {{ SUMS(1) }} else {{ SUMS(0) }}
#undef SUMS
    if (next)
      for (long i = (v * groups + g) * size / 4, end = i + size / 4; i < end; i += 64)
        __builtin_prefetch(next + i, 0, 2);{zero}
    const f32x16 scale = {planes.scale(spec)}((const uint16_t *)p + 16 * v);
    const i32x16 *e = d[g % 2];
    UNROLL for (int r = 0; r < H; r++) f[r] += to_float({exact}) * (scale * scales[16 * g + r]);
  }}
  UNROLL for (int r = 0; r < H; r++) out[r * {by}] = f[r];
}}

static int tiles_{key}(
    const int8_t *RESTRICT xq, const float *RESTRICT xs, const int32_t *RESTRICT xsum,
    const uint8_t *RESTRICT w, float *RESTRICT y{takes}, long M, long N, long K, long first, long last) {{
  const long width = WIDTH(K), groups = K / width, size = {size};
  const long count = (M + 15) / 16, R = (M + count - 1) / count;   /* tiles of rows, and rows of each */
  const long rows = 16 * count * groups;
  char *const memory = malloc(8 * rows + 64 * K + 64);
  if (!memory) return 0;
  float *const scales = (float *)(((uintptr_t)memory + 63) / 64 * 64);
  int32_t *const sums = (int32_t *)scales + rows;
  uint8_t *const codes = (uint8_t *)(sums + rows);
  for (long t = 0; t < count; t++)
    for (long r = 0; r < 16; r++) {{
      /* the last tile begins early enough to be whole */
      const long m = (t + 1) * R < M ? t * R + r : M - R + r;
      for (long g = 0; g < groups; g++) {{
        scales[16 * (t * groups + g) + r] = r < R ? xs[m * groups + g] : 0.0f;
        sums[16 * (t * groups + g) + r] = r < R ? xsum[m * groups + g] : 0;
      }}
    }}
  tiles_of(R, {step(spec)});
  for (long block = first; block < last; block++) {{
    const uint8_t *p = w + block * groups * size;
    if (count > 1) for (long v = 0; v < 4; v++) unpack_{key}(codes + 16 * K * v, p, v, K);
    for (long t = 0; t < count; t++) {{
      const long at = t * R, m0 = at + R < M ? at : M - R;
      const uint8_t *next = t || block + 1 == last ? 0 : p + groups * size;
      for (long v0 = 0; v0 < {4 // by}; v0++) {{
        f32x16 f[16][{by}];
        for (int i = 0; i < {by}; i++) {{
          uint8_t *const mine = codes + (count > 1 ? 16 * K * (v0 + 2 * i) : 0);
          if (count == 1) unpack_{key}(mine, p, v0 + 2 * i, K);   /* used once: they stay near */
#define ROWS(H) \\
          rows_{key}(H, xq + m0 * K, scales + 16 * t * groups, sums + 16 * t * groups, p, mine, \\
                     v0 + 2 * i, K, next, f[0] + i)
          if (R > 8) ROWS(16); else ROWS(8);
#undef ROWS
        }}
        for (long m = at; m < at + R && m < M; m++) {{
          const long r = m - m0;
{planes.finished(spec.paired, spec.epilogue, by, {n: e.c for n, e in EPILOGUES.items()})}
        }}
      }}
    }}
  }}
  TILES_DONE();
  free(memory);
  return 1;
}}
#endif
"""


def _unpack(spec: QuantLinearSpec, size: str) -> str:
    """The function that writes the codes of vector v of a block: four columns of its channels to 64 bytes."""
    store = "memcpy(out + 16 * {at}, &{w}, 64);"
    if spec.symmetric:
        store = f"{{{{ u8x64 less = {{w}} - {spec.mid}; {store.replace('&{w}', '&less')} }}}}"
    return f"""
static void unpack_{spec.key}(uint8_t *RESTRICT out, const uint8_t *RESTRICT p, long v, long K) {{
  const long width = WIDTH(K), groups = K / width, size = {size};
  for (long g = 0; g < groups; g++, p += size) {{
    const uint8_t *codes = p + {planes.head(spec)};
    for (long s = 0; s < width; s += {spec.columns}, out += {16 * spec.columns}) {{
{planes.unpacked(spec, store)}
        codes += {planes.step_bytes(spec)};
    }}
  }}
}}"""
