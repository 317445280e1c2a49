"""sparse_linear in C: codes of weights that are not zero, put back in their places 64 at a time.

One row is bound by reading the matrix, and here reads less of it. With AVX-512 VBMI2 one instruction puts 64
bytes in their places; without it a table does for every eight. For many rows a block is written out once and
goes through quant_linear, so that its tiles serve them.
"""

from __future__ import annotations

from functools import cache

from effc.kernels.cpu.entry import self_contained
from effc.kernels.epilogue import EPILOGUES, operands
from effc.kernels.quant_linear import emit_c as quant_c
from effc.kernels.quant_linear.spec import BLOCK
from effc.kernels.sparse_linear.spec import SparseLinearSpec

FEW = 3
"""Rows up to which codes are used as they come; proved bit-equal to the other way, so not in the spec."""

PLACES = r"""
#ifndef PLACES
#define PLACES
#include <stdlib.h>
INLINE long bits_of(uint64_t v) { return __builtin_popcountll(v); }
/* byte i of the result: the next of v where bit i is set, 0 elsewhere */
INLINE u8x64 placed(u8x64 v, uint64_t bits) {
  uint8_t from[128], to[64];
  memcpy(from, &v, 64);
  memset(from + 64, 0, 64);
#if defined(__AVX2__)
  const uint8_t *p = from;
  for (int i = 0; i < 8; i++, bits >>= 8) {
    const uint64_t some = bits & 255, spread = (some * 0x0101010101010101u & 0x8040201008040201u)
                                               + 0x7f7f7f7f7f7f7f7fu & 0x8080808080808080u;
    const uint64_t ones = spread >> 7, rank = ones * 0x0101010101010101u - ones;
    const uint64_t at = rank | (~spread & 0x8080808080808080u);   /* where bit 7 is set, zero comes */
    uint64_t next; memcpy(&next, p, 8);
    const __m128i codes = _mm_cvtsi64_si128((long long)next), places = _mm_cvtsi64_si128((long long)at);
    next = (uint64_t)_mm_cvtsi128_si64(_mm_shuffle_epi8(codes, places));
    memcpy(to + 8 * i, &next, 8);
    p += bits_of(some);
  }
#else
  for (int i = 0, n = 0; i < 64; i++) to[i] = bits >> i & 1 ? from[n++] : 0;
#endif
  u8x64 out; memcpy(&out, to, sizeof out);
  return out;
}
#if defined(__AVX512F__)
#define BY_EXPANDING __attribute__((target("avx512vbmi2")))
static BY_EXPANDING inline __attribute__((always_inline)) u8x64 expanded(u8x64 v, uint64_t bits) {
  return (u8x64)_mm512_maskz_expand_epi8((__mmask64)bits, (__m512i)v);
}
#endif
#endif
"""


def function(spec: SparseLinearSpec) -> str:
    """`sparse_linear_<key>` on blocks first to last, as quant_linear's, which it calls for many rows."""
    one = spec.packed
    names = operands(one.epilogue)
    takes = "".join(f", const float *RESTRICT {name}" for name in names)
    gives = "".join(f", {name}" for name in names)
    width = f"{one.group}L" if one.group else "K"
    plain = _way(spec, "placed", "", "plain", takes, gives)
    fast = _way(spec, "expanded", "BY_EXPANDING", "expanding", takes, gives)
    arguments = f"xq, xs, xsum, scales, bits, codes, starts, y{gives}, M, N, K, first, last"
    return f"""{PLACES}{plain}
#if defined(__AVX512F__){fast}
#endif
static void sparse_linear_{spec.key}(
    const int8_t *RESTRICT xq, const float *RESTRICT xs, const int32_t *RESTRICT xsum,
    const uint16_t *RESTRICT scales, const uint64_t *RESTRICT bits, const uint8_t *RESTRICT codes,
    const int64_t *RESTRICT starts, float *RESTRICT y{takes}, long M, long N, long K,
    long first, long last) {{
  const long width = {width}, size = K / width * ({2 * BLOCK} + width * {BLOCK * one.bits // 8});
  uint8_t *block = M > {FEW} ? malloc(size + 64) : 0;
#if defined(__AVX512F__)
  if (__builtin_cpu_supports("avx512vbmi2")) {{
    if (block) whole_expanding_{spec.key}({arguments}, block, size);
    else few_expanding_{spec.key}({arguments});
    free(block);
    return;
  }}
#endif
  if (block) whole_plain_{spec.key}({arguments}, block, size);
  else few_plain_{spec.key}({arguments});
  free(block);
}}
"""


_TAKES = """
    const int8_t *RESTRICT xq, const float *RESTRICT xs, const int32_t *RESTRICT xsum,
    const uint16_t *RESTRICT scales, const uint64_t *RESTRICT bits, const uint8_t *RESTRICT codes,
    const int64_t *RESTRICT starts, float *RESTRICT y{takes}, long M, long N, long K,
    long first, long last"""


def _way(spec: SparseLinearSpec, place: str, marked: str, name: str, takes: str, gives: str) -> str:
    """Both functions with one way to put codes in their places."""
    one, given = spec.packed, _TAKES.format(takes=takes)
    width = f"{one.group}L" if one.group else "K"
    inline = f"static {marked} inline __attribute__((always_inline))"
    tiles = "".join(_few(spec, rows, place, inline, name, takes) for rows in range(1, FEW + 1))
    calls = "\n".join(
        f"    for (; m + {rows} <= M; m += {rows})\n"
        f"      few{rows}_{name}_{spec.key}(m, block, xq, xs, xsum, scales, bits, codes + starts[block], "
        f"y{gives}, N, K);"
        for rows in range(FEW, 0, -1)
    )
    return f"""{tiles}
static {marked} void few_{name}_{spec.key}({given}) {{
  for (long block = first; block < last; block++) {{
    long m = 0;
{calls}
  }}
}}

/* every block as quant_linear has it, then all rows through it */
static {marked} void whole_{name}_{spec.key}({given}, uint8_t *RESTRICT dense, long size) {{
  const long width = {width}, groups = K / width;
  for (long block = first; block < last; block++) {{
    const uint8_t *p = codes + starts[block];
    const uint64_t *b = bits + block * K;
    uint8_t *to = dense;
    for (long g = 0; g < groups; g++) {{
      memcpy(to, scales + (block * groups + g) * {BLOCK}, {2 * BLOCK});
      to += {2 * BLOCK};
      for (long s = 0; s < width; s++, to += 64) {{
        {_next(spec, place)}
        memcpy(to, &c, 64);
      }}
    }}
    const uint8_t *w = (const uint8_t *)((uintptr_t)dense - (uintptr_t)(block * size));
    quant_linear_{one.key}(xq, xs, xsum, w, y{gives}, M, N, K, block, block + 1);
  }}
}}
"""


def _next(spec: SparseLinearSpec, place: str) -> str:
    """The 64 codes of the next vector as `c`, p moved behind them."""
    mid = f"0x{spec.packed.mid * 0x01010101:08x}u"
    return f"u8x64 c = {place}(load_bytes(p), *b); c = (u8x64)((u32x16)c ^ {mid}); p += bits_of(*b++);"


def _few(spec: SparseLinearSpec, rows: int, place: str, inline: str, name: str, takes: str) -> str:
    """A few rows times one block."""
    one = spec.packed
    width = f"{one.group}L" if one.group else "K"
    scale = "load_f16" if one.scale == "float16" else "load_bf16"
    each_row, each = f"TILED for (int r = 0; r < {rows}; r++)", "TILED for (int i = 0; i < 4; i++)"
    return f"""
{inline} void few{rows}_{name}_{spec.key}(long m0, long block,
    const int8_t *RESTRICT xq, const float *RESTRICT xs, const int32_t *RESTRICT xsum,
    const uint16_t *RESTRICT scales, const uint64_t *RESTRICT bits, const uint8_t *RESTRICT p,
    float *RESTRICT y{takes}, long N, long K) {{
  const long width = {width}, groups = K / width;
  const uint64_t *b = bits + block * K;
  f32x16 f[{rows}][4];
  {each_row} {each} f[r][i] = all(0.0f);
  for (long g = 0; g < groups; g++) {{
    i32x16 d[{rows}][4];
    {each_row} {each} d[r][i] = all_int({one.mid}) * -xsum[(m0 + r) * groups + g];
    const int8_t *a = xq + m0 * K + g * width;
    for (long s = 0; s < width; s += 4, a += 4)
      {each} {{
        {_next(spec, place)}
        {each_row} d[r][i] = dot4(d[r][i], c, load_word(a + r * K));
      }}
    {each} {{
      f32x16 scale = {scale}(scales + (block * groups + g) * {BLOCK} + 16 * i);
      {each_row} f[r][i] += to_float(d[r][i]) * (scale * xs[(m0 + r) * groups + g]);
    }}
  }}
  {each_row} {{
    const long m = m0 + r;
{_finish(spec)}
  }}
}}
"""


def _finish(spec: SparseLinearSpec) -> str:
    """The epilogue on each vector, then the store."""
    one = spec.packed
    chain, vectors = list(one.epilogue), 2 if one.paired else 4
    lines = [
        f"TILED for (int i = 0; i < {vectors}; i++) {{",
        f"  const long n = block * {16 * vectors}L + 16 * i, count = N - n;",
        "  if (count <= 0) continue;",
        "  f32x16 a = f[r][i];",
    ]
    if one.paired:
        lines += [f"  a = {EPILOGUES[chain.pop(0)].c};", "  a = a * f[r][i + 2];"]
    lines += [f"  a = {EPILOGUES[name].c};" for name in chain]
    lines += ["  give(y + m * N + n, a, count);", "}"]
    return "\n".join("    " + line for line in lines)


_MATRIX = {"scales": "const uint16_t *", "bits": "const uint64_t *", "codes": "const uint8_t *"}
_ROWS = {"xq": "const int8_t *", "xs": "const float *", "xsum": "const int32_t *"}


@cache
def emit(spec: SparseLinearSpec) -> str:
    """The self-contained file; operands of the epilogue come last."""
    names = operands(spec.packed.epilogue)
    fields = _ROWS | _MATRIX | {"starts": "const int64_t *", "y": "float *"}
    fields |= dict.fromkeys(names, "const float *") | dict.fromkeys(("M", "N", "K", "blocks"), "long")
    given = ", ".join(f"a->{name}" for name in fields if name != "blocks")
    work = (
        f"  sparse_linear_{spec.key}({given},\n"
        "    a->blocks * member / members, a->blocks * (member + 1) / members);"
    )
    text = quant_c.QUANTIZE + quant_c.function(spec.packed) + function(spec)
    return self_contained(spec, text, fields, work)
