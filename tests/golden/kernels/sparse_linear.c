
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

static  inline __attribute__((always_inline)) void few1_plain_013c2d3b7595192d(long m0, long block,
    const int8_t *RESTRICT xq, const float *RESTRICT xs, const int32_t *RESTRICT xsum,
    const uint16_t *RESTRICT scales, const uint64_t *RESTRICT bits, const uint8_t *RESTRICT p,
    float *RESTRICT y, long N, long K) {
  const long width = 64L, groups = K / width;
  const uint64_t *b = bits + block * K;
  f32x16 f[1][4];
  TILED for (int r = 0; r < 1; r++) TILED for (int i = 0; i < 4; i++) f[r][i] = all(0.0f);
  for (long g = 0; g < groups; g++) {
    i32x16 d[1][4];
    TILED for (int r = 0; r < 1; r++) TILED for (int i = 0; i < 4; i++) d[r][i] = all_int(128) * -xsum[(m0 + r) * groups + g];
    const int8_t *a = xq + m0 * K + g * width;
    for (long s = 0; s < width; s += 4, a += 4)
      TILED for (int i = 0; i < 4; i++) {
        u8x64 c = placed(load_bytes(p), *b); c = (u8x64)((u32x16)c ^ 0x80808080u); p += bits_of(*b++);
        TILED for (int r = 0; r < 1; r++) d[r][i] = dot4(d[r][i], c, load_word(a + r * K));
      }
    TILED for (int i = 0; i < 4; i++) {
      f32x16 scale = load_f16(scales + (block * groups + g) * 64 + 16 * i);
      TILED for (int r = 0; r < 1; r++) f[r][i] += to_float(d[r][i]) * (scale * xs[(m0 + r) * groups + g]);
    }
  }
  TILED for (int r = 0; r < 1; r++) {
    const long m = m0 + r;
    TILED for (int i = 0; i < 4; i++) {
      const long n = block * 64L + 16 * i, count = N - n;
      if (count <= 0) continue;
      f32x16 a = f[r][i];
      give(y + m * N + n, a, count);
    }
  }
}

static  inline __attribute__((always_inline)) void few2_plain_013c2d3b7595192d(long m0, long block,
    const int8_t *RESTRICT xq, const float *RESTRICT xs, const int32_t *RESTRICT xsum,
    const uint16_t *RESTRICT scales, const uint64_t *RESTRICT bits, const uint8_t *RESTRICT p,
    float *RESTRICT y, long N, long K) {
  const long width = 64L, groups = K / width;
  const uint64_t *b = bits + block * K;
  f32x16 f[2][4];
  TILED for (int r = 0; r < 2; r++) TILED for (int i = 0; i < 4; i++) f[r][i] = all(0.0f);
  for (long g = 0; g < groups; g++) {
    i32x16 d[2][4];
    TILED for (int r = 0; r < 2; r++) TILED for (int i = 0; i < 4; i++) d[r][i] = all_int(128) * -xsum[(m0 + r) * groups + g];
    const int8_t *a = xq + m0 * K + g * width;
    for (long s = 0; s < width; s += 4, a += 4)
      TILED for (int i = 0; i < 4; i++) {
        u8x64 c = placed(load_bytes(p), *b); c = (u8x64)((u32x16)c ^ 0x80808080u); p += bits_of(*b++);
        TILED for (int r = 0; r < 2; r++) d[r][i] = dot4(d[r][i], c, load_word(a + r * K));
      }
    TILED for (int i = 0; i < 4; i++) {
      f32x16 scale = load_f16(scales + (block * groups + g) * 64 + 16 * i);
      TILED for (int r = 0; r < 2; r++) f[r][i] += to_float(d[r][i]) * (scale * xs[(m0 + r) * groups + g]);
    }
  }
  TILED for (int r = 0; r < 2; r++) {
    const long m = m0 + r;
    TILED for (int i = 0; i < 4; i++) {
      const long n = block * 64L + 16 * i, count = N - n;
      if (count <= 0) continue;
      f32x16 a = f[r][i];
      give(y + m * N + n, a, count);
    }
  }
}

static  inline __attribute__((always_inline)) void few3_plain_013c2d3b7595192d(long m0, long block,
    const int8_t *RESTRICT xq, const float *RESTRICT xs, const int32_t *RESTRICT xsum,
    const uint16_t *RESTRICT scales, const uint64_t *RESTRICT bits, const uint8_t *RESTRICT p,
    float *RESTRICT y, long N, long K) {
  const long width = 64L, groups = K / width;
  const uint64_t *b = bits + block * K;
  f32x16 f[3][4];
  TILED for (int r = 0; r < 3; r++) TILED for (int i = 0; i < 4; i++) f[r][i] = all(0.0f);
  for (long g = 0; g < groups; g++) {
    i32x16 d[3][4];
    TILED for (int r = 0; r < 3; r++) TILED for (int i = 0; i < 4; i++) d[r][i] = all_int(128) * -xsum[(m0 + r) * groups + g];
    const int8_t *a = xq + m0 * K + g * width;
    for (long s = 0; s < width; s += 4, a += 4)
      TILED for (int i = 0; i < 4; i++) {
        u8x64 c = placed(load_bytes(p), *b); c = (u8x64)((u32x16)c ^ 0x80808080u); p += bits_of(*b++);
        TILED for (int r = 0; r < 3; r++) d[r][i] = dot4(d[r][i], c, load_word(a + r * K));
      }
    TILED for (int i = 0; i < 4; i++) {
      f32x16 scale = load_f16(scales + (block * groups + g) * 64 + 16 * i);
      TILED for (int r = 0; r < 3; r++) f[r][i] += to_float(d[r][i]) * (scale * xs[(m0 + r) * groups + g]);
    }
  }
  TILED for (int r = 0; r < 3; r++) {
    const long m = m0 + r;
    TILED for (int i = 0; i < 4; i++) {
      const long n = block * 64L + 16 * i, count = N - n;
      if (count <= 0) continue;
      f32x16 a = f[r][i];
      give(y + m * N + n, a, count);
    }
  }
}

static  void few_plain_013c2d3b7595192d(
    const int8_t *RESTRICT xq, const float *RESTRICT xs, const int32_t *RESTRICT xsum,
    const uint16_t *RESTRICT scales, const uint64_t *RESTRICT bits, const uint8_t *RESTRICT codes,
    const int64_t *RESTRICT starts, float *RESTRICT y, long M, long N, long K,
    long first, long last) {
  for (long block = first; block < last; block++) {
    long m = 0;
    for (; m + 3 <= M; m += 3)
      few3_plain_013c2d3b7595192d(m, block, xq, xs, xsum, scales, bits, codes + starts[block], y, N, K);
    for (; m + 2 <= M; m += 2)
      few2_plain_013c2d3b7595192d(m, block, xq, xs, xsum, scales, bits, codes + starts[block], y, N, K);
    for (; m + 1 <= M; m += 1)
      few1_plain_013c2d3b7595192d(m, block, xq, xs, xsum, scales, bits, codes + starts[block], y, N, K);
  }
}

/* every block as quant_linear has it, then all rows through it */
static  void whole_plain_013c2d3b7595192d(
    const int8_t *RESTRICT xq, const float *RESTRICT xs, const int32_t *RESTRICT xsum,
    const uint16_t *RESTRICT scales, const uint64_t *RESTRICT bits, const uint8_t *RESTRICT codes,
    const int64_t *RESTRICT starts, float *RESTRICT y, long M, long N, long K,
    long first, long last, uint8_t *RESTRICT dense, long size) {
  const long width = 64L, groups = K / width;
  for (long block = first; block < last; block++) {
    const uint8_t *p = codes + starts[block];
    const uint64_t *b = bits + block * K;
    uint8_t *to = dense;
    for (long g = 0; g < groups; g++) {
      memcpy(to, scales + (block * groups + g) * 64, 128);
      to += 128;
      for (long s = 0; s < width; s++, to += 64) {
        u8x64 c = placed(load_bytes(p), *b); c = (u8x64)((u32x16)c ^ 0x80808080u); p += bits_of(*b++);
        memcpy(to, &c, 64);
      }
    }
    const uint8_t *w = (const uint8_t *)((uintptr_t)dense - (uintptr_t)(block * size));
    quant_linear_dense(xq, xs, xsum, w, y, M, N, K, block, block + 1);
  }
}

#if defined(__AVX512F__)
static BY_EXPANDING inline __attribute__((always_inline)) void few1_expanding_013c2d3b7595192d(long m0, long block,
    const int8_t *RESTRICT xq, const float *RESTRICT xs, const int32_t *RESTRICT xsum,
    const uint16_t *RESTRICT scales, const uint64_t *RESTRICT bits, const uint8_t *RESTRICT p,
    float *RESTRICT y, long N, long K) {
  const long width = 64L, groups = K / width;
  const uint64_t *b = bits + block * K;
  f32x16 f[1][4];
  TILED for (int r = 0; r < 1; r++) TILED for (int i = 0; i < 4; i++) f[r][i] = all(0.0f);
  for (long g = 0; g < groups; g++) {
    i32x16 d[1][4];
    TILED for (int r = 0; r < 1; r++) TILED for (int i = 0; i < 4; i++) d[r][i] = all_int(128) * -xsum[(m0 + r) * groups + g];
    const int8_t *a = xq + m0 * K + g * width;
    for (long s = 0; s < width; s += 4, a += 4)
      TILED for (int i = 0; i < 4; i++) {
        u8x64 c = expanded(load_bytes(p), *b); c = (u8x64)((u32x16)c ^ 0x80808080u); p += bits_of(*b++);
        TILED for (int r = 0; r < 1; r++) d[r][i] = dot4(d[r][i], c, load_word(a + r * K));
      }
    TILED for (int i = 0; i < 4; i++) {
      f32x16 scale = load_f16(scales + (block * groups + g) * 64 + 16 * i);
      TILED for (int r = 0; r < 1; r++) f[r][i] += to_float(d[r][i]) * (scale * xs[(m0 + r) * groups + g]);
    }
  }
  TILED for (int r = 0; r < 1; r++) {
    const long m = m0 + r;
    TILED for (int i = 0; i < 4; i++) {
      const long n = block * 64L + 16 * i, count = N - n;
      if (count <= 0) continue;
      f32x16 a = f[r][i];
      give(y + m * N + n, a, count);
    }
  }
}

static BY_EXPANDING inline __attribute__((always_inline)) void few2_expanding_013c2d3b7595192d(long m0, long block,
    const int8_t *RESTRICT xq, const float *RESTRICT xs, const int32_t *RESTRICT xsum,
    const uint16_t *RESTRICT scales, const uint64_t *RESTRICT bits, const uint8_t *RESTRICT p,
    float *RESTRICT y, long N, long K) {
  const long width = 64L, groups = K / width;
  const uint64_t *b = bits + block * K;
  f32x16 f[2][4];
  TILED for (int r = 0; r < 2; r++) TILED for (int i = 0; i < 4; i++) f[r][i] = all(0.0f);
  for (long g = 0; g < groups; g++) {
    i32x16 d[2][4];
    TILED for (int r = 0; r < 2; r++) TILED for (int i = 0; i < 4; i++) d[r][i] = all_int(128) * -xsum[(m0 + r) * groups + g];
    const int8_t *a = xq + m0 * K + g * width;
    for (long s = 0; s < width; s += 4, a += 4)
      TILED for (int i = 0; i < 4; i++) {
        u8x64 c = expanded(load_bytes(p), *b); c = (u8x64)((u32x16)c ^ 0x80808080u); p += bits_of(*b++);
        TILED for (int r = 0; r < 2; r++) d[r][i] = dot4(d[r][i], c, load_word(a + r * K));
      }
    TILED for (int i = 0; i < 4; i++) {
      f32x16 scale = load_f16(scales + (block * groups + g) * 64 + 16 * i);
      TILED for (int r = 0; r < 2; r++) f[r][i] += to_float(d[r][i]) * (scale * xs[(m0 + r) * groups + g]);
    }
  }
  TILED for (int r = 0; r < 2; r++) {
    const long m = m0 + r;
    TILED for (int i = 0; i < 4; i++) {
      const long n = block * 64L + 16 * i, count = N - n;
      if (count <= 0) continue;
      f32x16 a = f[r][i];
      give(y + m * N + n, a, count);
    }
  }
}

static BY_EXPANDING inline __attribute__((always_inline)) void few3_expanding_013c2d3b7595192d(long m0, long block,
    const int8_t *RESTRICT xq, const float *RESTRICT xs, const int32_t *RESTRICT xsum,
    const uint16_t *RESTRICT scales, const uint64_t *RESTRICT bits, const uint8_t *RESTRICT p,
    float *RESTRICT y, long N, long K) {
  const long width = 64L, groups = K / width;
  const uint64_t *b = bits + block * K;
  f32x16 f[3][4];
  TILED for (int r = 0; r < 3; r++) TILED for (int i = 0; i < 4; i++) f[r][i] = all(0.0f);
  for (long g = 0; g < groups; g++) {
    i32x16 d[3][4];
    TILED for (int r = 0; r < 3; r++) TILED for (int i = 0; i < 4; i++) d[r][i] = all_int(128) * -xsum[(m0 + r) * groups + g];
    const int8_t *a = xq + m0 * K + g * width;
    for (long s = 0; s < width; s += 4, a += 4)
      TILED for (int i = 0; i < 4; i++) {
        u8x64 c = expanded(load_bytes(p), *b); c = (u8x64)((u32x16)c ^ 0x80808080u); p += bits_of(*b++);
        TILED for (int r = 0; r < 3; r++) d[r][i] = dot4(d[r][i], c, load_word(a + r * K));
      }
    TILED for (int i = 0; i < 4; i++) {
      f32x16 scale = load_f16(scales + (block * groups + g) * 64 + 16 * i);
      TILED for (int r = 0; r < 3; r++) f[r][i] += to_float(d[r][i]) * (scale * xs[(m0 + r) * groups + g]);
    }
  }
  TILED for (int r = 0; r < 3; r++) {
    const long m = m0 + r;
    TILED for (int i = 0; i < 4; i++) {
      const long n = block * 64L + 16 * i, count = N - n;
      if (count <= 0) continue;
      f32x16 a = f[r][i];
      give(y + m * N + n, a, count);
    }
  }
}

static BY_EXPANDING void few_expanding_013c2d3b7595192d(
    const int8_t *RESTRICT xq, const float *RESTRICT xs, const int32_t *RESTRICT xsum,
    const uint16_t *RESTRICT scales, const uint64_t *RESTRICT bits, const uint8_t *RESTRICT codes,
    const int64_t *RESTRICT starts, float *RESTRICT y, long M, long N, long K,
    long first, long last) {
  for (long block = first; block < last; block++) {
    long m = 0;
    for (; m + 3 <= M; m += 3)
      few3_expanding_013c2d3b7595192d(m, block, xq, xs, xsum, scales, bits, codes + starts[block], y, N, K);
    for (; m + 2 <= M; m += 2)
      few2_expanding_013c2d3b7595192d(m, block, xq, xs, xsum, scales, bits, codes + starts[block], y, N, K);
    for (; m + 1 <= M; m += 1)
      few1_expanding_013c2d3b7595192d(m, block, xq, xs, xsum, scales, bits, codes + starts[block], y, N, K);
  }
}

/* every block as quant_linear has it, then all rows through it */
static BY_EXPANDING void whole_expanding_013c2d3b7595192d(
    const int8_t *RESTRICT xq, const float *RESTRICT xs, const int32_t *RESTRICT xsum,
    const uint16_t *RESTRICT scales, const uint64_t *RESTRICT bits, const uint8_t *RESTRICT codes,
    const int64_t *RESTRICT starts, float *RESTRICT y, long M, long N, long K,
    long first, long last, uint8_t *RESTRICT dense, long size) {
  const long width = 64L, groups = K / width;
  for (long block = first; block < last; block++) {
    const uint8_t *p = codes + starts[block];
    const uint64_t *b = bits + block * K;
    uint8_t *to = dense;
    for (long g = 0; g < groups; g++) {
      memcpy(to, scales + (block * groups + g) * 64, 128);
      to += 128;
      for (long s = 0; s < width; s++, to += 64) {
        u8x64 c = expanded(load_bytes(p), *b); c = (u8x64)((u32x16)c ^ 0x80808080u); p += bits_of(*b++);
        memcpy(to, &c, 64);
      }
    }
    const uint8_t *w = (const uint8_t *)((uintptr_t)dense - (uintptr_t)(block * size));
    quant_linear_dense(xq, xs, xsum, w, y, M, N, K, block, block + 1);
  }
}

#endif
static void sparse_linear_013c2d3b7595192d(
    const int8_t *RESTRICT xq, const float *RESTRICT xs, const int32_t *RESTRICT xsum,
    const uint16_t *RESTRICT scales, const uint64_t *RESTRICT bits, const uint8_t *RESTRICT codes,
    const int64_t *RESTRICT starts, float *RESTRICT y, long M, long N, long K,
    long first, long last) {
  const long width = 64L, size = K / width * (128 + width * 64);
  uint8_t *block = M > 3 ? malloc(size + 64) : 0;
#if defined(__AVX512F__)
  if (__builtin_cpu_supports("avx512vbmi2")) {
    if (block) whole_expanding_013c2d3b7595192d(xq, xs, xsum, scales, bits, codes, starts, y, M, N, K, first, last, block, size);
    else few_expanding_013c2d3b7595192d(xq, xs, xsum, scales, bits, codes, starts, y, M, N, K, first, last);
    free(block);
    return;
  }
#endif
  if (block) whole_plain_013c2d3b7595192d(xq, xs, xsum, scales, bits, codes, starts, y, M, N, K, first, last, block, size);
  else few_plain_013c2d3b7595192d(xq, xs, xsum, scales, bits, codes, starts, y, M, N, K, first, last);
  free(block);
}
