
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

static void unpack_8c839fdd14061a29(const uint8_t *RESTRICT w, long row, float *RESTRICT y, long D) {
  const long width = 64L, groups = D / width, size = 128L + width * 32;
  const u32x16 shifts = {0, 8, 16, 24, 4, 12, 20, 28, 8, 16, 24, 0, 12, 20, 28, 4};
  const long c = row % 64;
  const uint8_t *p = w + row / 64 * groups * size;
  for (long g = 0; g < groups; g++, p += size) {
    uint16_t stored[16] = {0};
    memcpy(stored, p + 2 * c, 2);
    const float scale = load_f16(stored)[0], zero = 8;
    const uint8_t *codes = p + 128 + 64 * (c / 16) + 4 * (c % 16);
    for (long s = 0; s < width; s += 8, codes += 256, y += 8) {
      uint32_t word[1];
      for (int i = 0; i < 1; i++) memcpy(word + i, codes + 64 * i, 4);
      for (uint32_t i = 0; i < 1; i++) {
        u32x16 code = ((u32x16){0} + word[i]) >> shifts & 15u;
        f32x16 v = (to_float((i32x16)code) - zero) * scale;
        memcpy(y + 16 * i, &v, 32);
      }
    }
  }
}

static void embed_8c839fdd14061a29(const long *RESTRICT ids, const long *RESTRICT place,
    const void *RESTRICT table, const void *RESTRICT positions, const void *RESTRICT types,
    float *RESTRICT x, long D, long first, long last) {
  for (long m = first; m < last; m++) {
    float *p = x + m * D;
    unpack_8c839fdd14061a29(table, ids[m], p, D);
    for (long k = 0; k < D; k += 16) {
      const long count = D - k;
      f32x16 a = take(p + k, count);
      give(p + k, a, count);
    }
  }
}
