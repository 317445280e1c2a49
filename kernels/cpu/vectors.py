"""C text that every kernel begins with: vectors of 16 numbers, and what differs by processor.

The arithmetic of kernels is written once, on the compiler's own vector types; it becomes AVX-512, AVX2 or
plain instructions by the flags alone. Only loads of half floats and the four-way product of bytes are
written for each set.
"""

from __future__ import annotations

VECTORS = r"""
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#pragma GCC diagnostic ignored "-Wpsabi"
#define INLINE static inline __attribute__((always_inline))
#define RESTRICT __restrict__

typedef float    f32x16 __attribute__((vector_size(64)));
typedef int32_t  i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t   i8x16  __attribute__((vector_size(16)));
typedef uint8_t  u8x16  __attribute__((vector_size(16)));
typedef uint8_t  u8x64  __attribute__((vector_size(64)));

INLINE f32x16 load(const float *p) { f32x16 v; memcpy(&v, p, sizeof v); return v; }
INLINE void store(float *p, f32x16 v) { memcpy(p, &v, sizeof v); }
/* the first `count` of 16 numbers, the rest 0 */
INLINE f32x16 take(const float *p, long count) {
  if (__builtin_expect(count >= 16, 1)) return load(p);
  f32x16 v = {0}; memcpy(&v, p, sizeof(float) * count); return v;
}
INLINE void give(float *p, f32x16 v, long count) {
  if (__builtin_expect(count >= 16, 1)) store(p, v); else memcpy(p, &v, sizeof(float) * count);
}
INLINE u8x64 load_bytes(const uint8_t *p) { u8x64 v; memcpy(&v, p, sizeof v); return v; }
INLINE int32_t load_word(const int8_t *p) { int32_t v; memcpy(&v, p, sizeof v); return v; }
INLINE f32x16 all(float a) { return (f32x16){0} + a; }
INLINE i32x16 all_int(int32_t a) { return (i32x16){0} + a; }
INLINE f32x16 to_float(i32x16 v) { return __builtin_convertvector(v, f32x16); }
INLINE f32x16 choose(i32x16 mask, f32x16 yes, f32x16 no) {
  return (f32x16)((mask & (i32x16)yes) | (~mask & (i32x16)no));
}
INLINE f32x16 larger(f32x16 a, f32x16 b) { return choose(a > b, a, b); }
INLINE f32x16 magnitude(f32x16 a) { return (f32x16)((u32x16)a & 0x7fffffffu); }

/* 16 unsigned bytes as numbers of 32 bits */
INLINE i32x16 widen(const uint8_t *p) {
  u8x16 v; memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, i32x16);
}

/* 16 bfloat16 */
INLINE f32x16 load_bf16(const uint16_t *p) {
  u16x16 v; memcpy(&v, p, sizeof v);
  return (f32x16)(__builtin_convertvector(v, u32x16) << 16);
}

/* 16 half floats */
INLINE f32x16 load_f16(const uint16_t *p) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__F16C__)
  f32x16 v;
  _mm256_storeu_ps((float *)&v, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)));
  _mm256_storeu_ps((float *)&v + 8, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8))));
  return v;
#else
  u16x16 h; memcpy(&h, p, sizeof h);
  u32x16 w = __builtin_convertvector(h, u32x16), sign = (w & 0x8000u) << 16, rest = w & 0x7fffu;
  f32x16 normal = (f32x16)((rest << 13) + (112u << 23));
  f32x16 small = __builtin_convertvector((i32x16)rest, f32x16) * 5.9604644775390625e-8f;   /* 2^-24 */
  f32x16 huge = (f32x16)((rest << 13) | 0x7f800000u);
  f32x16 v = choose((i32x16)rest < 0x400, small, choose((i32x16)rest >= 0x7c00, huge, normal));
  return (f32x16)((u32x16)v | sign);
#endif
}

/* lane i of acc += sum over t < 4 of w[4 i + t] x[t]; w unsigned, x four signed bytes in one word */
INLINE i32x16 dot4(i32x16 acc, u8x64 w, int32_t x) {
#if defined(__AVX512VNNI__)
  return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
#elif defined(__AVX2__)
  /* pairs add up in 16 bits, so the top bit of w goes on its own: 2 * 128 * 127 < 2^15 */
  const __m256i b = _mm256_set1_epi32(x), ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(0x7f);
  __m256i half[2], sum[2];
  memcpy(half, &w, sizeof w);
  memcpy(sum, &acc, sizeof acc);
  for (int i = 0; i < 2; i++) {
    __m256i a = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_and_si256(half[i], low), b), ones);
    __m256i c = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_andnot_si256(low, half[i]), b), ones);
    sum[i] = _mm256_add_epi32(sum[i], _mm256_add_epi32(a, c));
  }
  memcpy(&acc, sum, sizeof acc);
  return acc;
#else
  int8_t b[4];
  memcpy(b, &x, 4);
  for (int i = 0; i < 16; i++)
    acc[i] += w[4 * i] * b[0] + w[4 * i + 1] * b[1] + w[4 * i + 2] * b[2] + w[4 * i + 3] * b[3];
  return acc;
#endif
}

INLINE float sum_of(f32x16 v) {
  float s[16];
  memcpy(s, &v, sizeof v);
  for (int width = 8; width; width /= 2) for (int i = 0; i < width; i++) s[i] += s[i + width];
  return s[0];
}

INLINE float largest_of(f32x16 v) {   /* not a number if one of them is not */
  float a = v[0];
  for (int i = 1; i < 16; i++) a = (v[i] > a) | (v[i] != v[i]) ? v[i] : a;
  return a;
}

/* to the nearest integer, ties to even; an instruction of its own, so that no product is fused into it */
INLINE f32x16 nearest(f32x16 v) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_roundscale_ps((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  __m256 half[2];
  memcpy(half, &v, sizeof v);
  for (int i = 0; i < 2; i++)
    half[i] = _mm256_round_ps(half[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  memcpy(&v, half, sizeof v);
  return v;
#else
  for (int i = 0; i < 16; i++) v[i] = rintf(v[i]);
  return v;
#endif
}

/* e^v within 2 units in the last place; 0 below -87.3, infinite above 88.7 */
INLINE f32x16 exponential(f32x16 v) {
  f32x16 x = choose(v > 88.8f, all(88.8f), choose(v < -87.5f, all(-87.5f), v));
  f32x16 n = nearest(x * 1.44269504088896341f);
  f32x16 r = x - n * 0.693359375f + n * 2.12194440e-4f;
  f32x16 p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  i32x16 e = __builtin_convertvector(n, i32x16), half = e >> 1;   /* in two factors: 2^128 has no float */
  f32x16 y = p * (f32x16)((half + 127) << 23) * (f32x16)((e - half + 127) << 23);
  return choose(v != v, v, choose(v < -87.4f, all(0.0f), y));
}

INLINE f32x16 sigmoid(f32x16 v) { return 1.0f / (1.0f + exponential(-v)); }
INLINE f32x16 hyperbolic_tangent(f32x16 v) {
  f32x16 e = exponential(-2.0f * magnitude(v)), t = (1.0f - e) / (1.0f + e);
  f32x16 small = v * (1.0f - v * v * 0.333333333f);
  t = (f32x16)((u32x16)t | ((u32x16)v & 0x80000000u));
  return choose(magnitude(v) < 0.01f, small, t);
}
INLINE f32x16 error_function(f32x16 v) {   /* Abramowitz and Stegun 7.1.26, absolute error below 2e-7 */
  f32x16 a = magnitude(v), t = 1.0f / (1.0f + 0.3275911f * a);
  f32x16 p = (1.061405429f * t - 1.453152027f) * t + 1.421413741f;
  p = ((p * t - 0.284496736f) * t + 0.254829592f) * t;
  f32x16 y = 1.0f - p * exponential(-a * a);
  return (f32x16)((u32x16)y | ((u32x16)v & 0x80000000u));
}
"""
