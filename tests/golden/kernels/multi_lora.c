
#ifndef STORED
#define STORED
typedef float stored_float32;
typedef uint16_t stored_bfloat16, stored_float16;
INLINE f32x16 load_float32(const float *p) { return load(p); }
INLINE f32x16 load_bfloat16(const uint16_t *p) { return load_bf16(p); }
INLINE f32x16 load_float16(const uint16_t *p) { return load_f16(p); }
INLINE f32x16 take_float32(const float *p, long count) { return take(p, count); }
INLINE f32x16 take_bfloat16(const uint16_t *p, long count) {
  uint16_t v[16] = {0};
  if (__builtin_expect(count >= 16, 1)) return load_bf16(p);
  memcpy(v, p, sizeof(uint16_t) * count);
  return load_bf16(v);
}
INLINE f32x16 take_float16(const uint16_t *p, long count) {
  uint16_t v[16] = {0};
  if (__builtin_expect(count >= 16, 1)) return load_f16(p);
  memcpy(v, p, sizeof(uint16_t) * count);
  return load_f16(v);
}
#endif

static void shrink_8ac02d27ac7f5496(const float *RESTRICT x, const stored_bfloat16 *RESTRICT a,
    const int32_t *RESTRICT edges, const long *RESTRICT index, long most, float *RESTRICT h, long K,
    long first, long last) {
  for (long item = first; item < last; item++) {
    const long m = item / most, row = edges[index[m]] + item % most;
    if (row >= edges[index[m] + 1]) continue;
    const float *p = x + m * K;
    const stored_bfloat16 *w = a + row * K;
    f32x16 s[2] = {{0}};
    long k = 0;
    for (; k + 32 <= K; k += 32) {
      s[0] += load(p + k) * load_bfloat16(w + k);
      s[1] += load(p + k + 16) * load_bfloat16(w + k + 16);
    }
    for (; k < K; k += 16) s[0] += take(p + k, K - k) * take_bfloat16(w + k, K - k);
    h[item] = sum_of(s[0] + s[1]);
  }
}

static void expand_8ac02d27ac7f5496(const float *RESTRICT h, const stored_bfloat16 *RESTRICT b,
    const int32_t *RESTRICT edges, const float *RESTRICT scales, const long *RESTRICT index, long most,
    const float *base, float *y, long N, long first, long last) {
  const long blocks = (N + 63) / 64;
  for (long item = first; item < last; item++) {
    const long m = item / blocks, n = item % blocks * 64, i = index[m];
    const long width = N - n < 64 ? N - n : 64;
    f32x16 s[4] = {{0}};
    for (long r = 0; r < edges[i + 1] - edges[i]; r++) {
      const float by = h[m * most + r] * scales[i];
      const stored_bfloat16 *w = b + (edges[i] + r) * N + n;
      for (long j = 0; 16 * j < width; j++) s[j] += by * take_bfloat16(w + 16 * j, width - 16 * j);
    }
    for (long j = 0; 16 * j < width; j++) {
      const long at = m * N + n + 16 * j, count = width - 16 * j;
      give(y + at, take(base + at, count) + s[j], count);
    }
  }
}
