"""C text of parts: vectors as wide as a register of the instruction set, for inner loops with many sums.

A vector of 16 numbers that does not fit one register lives in memory, so loops that must keep their sums in
registers work on PARTS parts of LANES lanes. The text guards itself against being pasted twice.
"""

from __future__ import annotations

PARTS = r"""
#ifndef UNROLL
#define UNROLL _Pragma("GCC unroll 16")
#if defined(__AVX512F__)
enum { LANES = 16, PARTS = 1 };
#elif defined(__AVX2__)
enum { LANES = 8, PARTS = 2 };
#else
enum { LANES = 4, PARTS = 4 };
#endif
/* a value that several sums use is loaded once: compilers load it with every one of them otherwise */
#if defined(__AVX512F__)
#define LOADED(v) __asm__("" : "+v"(v))
#elif defined(__AVX2__)
#define LOADED(v) __asm__("" : "+x"(v))
#else
#define LOADED(v) ((void)0)
#endif
typedef float    part        __attribute__((vector_size(4 * LANES)));
typedef uint16_t part_of_u16 __attribute__((vector_size(2 * LANES)));
typedef uint32_t part_of_u32 __attribute__((vector_size(4 * LANES)));
INLINE part part_all(float a) {   /* loaded to all lanes at once */
#if defined(__AVX512F__)
  return (part)_mm512_set1_ps(a);
#elif defined(__AVX2__)
  return (part)_mm256_set1_ps(a);
#else
  return (part){a, a, a, a};
#endif
}
INLINE part part_float32(const float *p) { part v; memcpy(&v, p, sizeof v); return v; }
INLINE part part_bfloat16(const uint16_t *p) {   /* gcc 12 converts to 512 bits in halves, twice the cost */
#if defined(__AVX512F__)
  return (part)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#else
  part_of_u16 v; memcpy(&v, p, sizeof v);
  return (part)(__builtin_convertvector(v, part_of_u32) << 16);
#endif
}
INLINE part part_float16(const uint16_t *p) {
#if defined(__AVX512F__)
  return load_f16(p);
#elif defined(__F16C__)
  return (part)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
  uint16_t v[16] = {0}; memcpy(v, p, 2 * LANES);
  f32x16 wide = load_f16(v);
  part out; memcpy(&out, &wide, sizeof out);
  return out;
#endif
}
#endif
"""
