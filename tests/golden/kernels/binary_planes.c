
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

static void blocks1_7a3474f9ac9cc90c(long m, long block,
    const float *RESTRICT x, const uint32_t *RESTRICT words, const int8_t *RESTRICT scales,
    float *RESTRICT y, const float *RESTRICT bias, long N, long K, long runs) {
  const long strides = (K + 31) / 32, apart = strides * 128;
  const uint32_t *w = words + block * apart;
  x += m * K;
  f32x16 f[4];
  EVERY for (int v = 0; v < 4; v++) f[v] = all(0.0f);
  const long padded = strides * 32;
  const int8_t *a = scales + block * 64 / 128 * padded;
  for (long k = 0; k < K; k += 32, a += 32) {
    const f32x16 own[2] = {some(x + k, K - k), some(x + k + 16, K - k - 16)};
    for (int p = 0; p < 2; p++, w += 64) {
      float scaled[32];
      EVERY for (int i = 0; i < 2; i++) store(scaled + 16 * i, own[i] * (powers(a + (p * 1 + 0) * runs * padded + 16 * i)));
      EVERY for (int s = 0; s < 8; s++) {
        const f32x16 sums = sums_with_signs(scaled + 4 * s);
        EVERY for (int v = 0; v < 4; v++)
          f[v] += lookup(sums, load_words(w + v / 4 * apart + v % 4 * 16) >> 4 * s);
      }
    }
  }
  EVERY for (int v = 0; v < 4; v++) {
    const long n = block * 64 + 16 * v, count = N - n < 16 ? N - n : 16;
    if (count <= 0) break;
    f32x16 a = f[v];
    a = a + take(bias + n, count);
    give(y + m * N + n, a, count);
  }
}

#if defined(__AVX512F__)   /* where the registers hold the sums of several blocks */

static void blocks4_7a3474f9ac9cc90c(long m, long block,
    const float *RESTRICT x, const uint32_t *RESTRICT words, const int8_t *RESTRICT scales,
    float *RESTRICT y, const float *RESTRICT bias, long N, long K, long runs) {
  const long strides = (K + 31) / 32, apart = strides * 128;
  const uint32_t *w = words + block * apart;
  x += m * K;
  f32x16 f[16];
  EVERY for (int v = 0; v < 16; v++) f[v] = all(0.0f);
  const long padded = strides * 32;
  const int8_t *a = scales + block * 64 / 128 * padded;
  for (long k = 0; k < K; k += 32, a += 32) {
    const f32x16 own[2] = {some(x + k, K - k), some(x + k + 16, K - k - 16)};
    for (int p = 0; p < 2; p++, w += 64) {
      float scaled[32];
      EVERY for (int i = 0; i < 2; i++) store(scaled + 16 * i, own[i] * (powers(a + (p * 1 + 0) * runs * padded + 16 * i)));
      EVERY for (int s = 0; s < 8; s++) {
        const f32x16 sums = sums_with_signs(scaled + 4 * s);
        EVERY for (int v = 0; v < 16; v++)
          f[v] += lookup(sums, load_words(w + v / 4 * apart + v % 4 * 16) >> 4 * s);
      }
    }
  }
  EVERY for (int v = 0; v < 16; v++) {
    const long n = block * 64 + 16 * v, count = N - n < 16 ? N - n : 16;
    if (count <= 0) break;
    f32x16 a = f[v];
    a = a + take(bias + n, count);
    give(y + m * N + n, a, count);
  }
}

#endif
static void binary_planes_7a3474f9ac9cc90c(
    const float *RESTRICT x, const uint32_t *RESTRICT words, const int8_t *RESTRICT scales,
    float *RESTRICT y, const float *RESTRICT bias, long M, long N, long K, long runs, long first, long last) {
  for (long block = first; block < last; block++) {
#if defined(__AVX512F__)
    if (block + 4 <= last && (block + 3) * 64 / 128 == block * 64 / 128) {
      for (long m = 0; m < M; m++) blocks4_7a3474f9ac9cc90c(m, block, x, words, scales, y, bias, N, K, runs);
      block += 3;
      continue;
    }
#endif
    for (long m = 0; m < M; m++) blocks1_7a3474f9ac9cc90c(m, block, x, words, scales, y, bias, N, K, runs);
  }
}
