
#undef WIDTH
#undef COLUMNS
#define WIDTH(K) 64L
#define COLUMNS 64L

INLINE void tile6_5e11ca8963f3fe1c(const int v0, long m0, long block,
    const int8_t *RESTRICT xq, const float *RESTRICT xs, const int32_t *RESTRICT xsum,
    const uint8_t *RESTRICT w, float *RESTRICT y, const float *RESTRICT bias, const float *RESTRICT residual, long N, long K) {
  const long width = WIDTH(K), groups = K / width, size = 192L + width * 32;
  const uint8_t *p = w + block * groups * size;
  f32x16 f[6][2];
  TILED for (int r = 0; r < 6; r++) TILED for (int i = 0; i < 2; i++) f[r][i] = all(0.0f);
  for (long g = 0; g < groups; g++, p += size) {
    i32x16 d[6][2];
    TILED for (int i = 0; i < 2; i++) {
      i32x16 zero = widen(p + 128 + 16 * (v0 + i * 1));
      TILED for (int r = 0; r < 6; r++) d[r][i] = zero * -xsum[(m0 + r) * groups + g];
    }
    const uint8_t *codes = p + 192;
    const int8_t *a = xq + m0 * K + g * width;
    for (long s = 0; s < width; s += 8) {
      TILED for (int i = 0; i < 2; i++) {
        const int v = v0 + i * 1;
        u32x16 q = (u32x16)load_bytes(codes + 64 * v);
        { u8x64 c = (u8x64)(q & 0x0f0f0f0fu); TILED for (int r = 0; r < 6; r++) d[r][i] = dot4(d[r][i], c, load_word(a + r * K + 0)); }
        { u8x64 c = (u8x64)((q >> 4) & 0x0f0f0f0fu); TILED for (int r = 0; r < 6; r++) d[r][i] = dot4(d[r][i], c, load_word(a + r * K + 4)); }
      }
      codes += 256;
      a += 8;
    }
    TILED for (int i = 0; i < 2; i++) {
      f32x16 scale = load_f16((const uint16_t *)p + 16 * (v0 + i * 1));
      TILED for (int r = 0; r < 6; r++) f[r][i] += to_float(d[r][i]) * (scale * xs[(m0 + r) * groups + g]);
    }
  }
  TILED for (int r = 0; r < 6; r++) {
    const long m = m0 + r;
    TILED for (int i = 0; i < 2; i++) {
      const long n = block * COLUMNS + 16 * (v0 + i), count = N - n;
      if (count <= 0) continue;
      f32x16 a = f[r][i];
      a = a + take(bias + n, count);
      a = a + take(residual + m * N + n, count);
      give(y + m * N + n, a, count);
    }
  }
}

INLINE void tile3_5e11ca8963f3fe1c(const int v0, long m0, long block,
    const int8_t *RESTRICT xq, const float *RESTRICT xs, const int32_t *RESTRICT xsum,
    const uint8_t *RESTRICT w, float *RESTRICT y, const float *RESTRICT bias, const float *RESTRICT residual, long N, long K) {
  const long width = WIDTH(K), groups = K / width, size = 192L + width * 32;
  const uint8_t *p = w + block * groups * size;
  f32x16 f[3][4];
  TILED for (int r = 0; r < 3; r++) TILED for (int i = 0; i < 4; i++) f[r][i] = all(0.0f);
  for (long g = 0; g < groups; g++, p += size) {
    i32x16 d[3][4];
    TILED for (int i = 0; i < 4; i++) {
      i32x16 zero = widen(p + 128 + 16 * (v0 + i * 1));
      TILED for (int r = 0; r < 3; r++) d[r][i] = zero * -xsum[(m0 + r) * groups + g];
    }
    const uint8_t *codes = p + 192;
    const int8_t *a = xq + m0 * K + g * width;
    for (long s = 0; s < width; s += 8) {
      TILED for (int i = 0; i < 4; i++) {
        const int v = v0 + i * 1;
        u32x16 q = (u32x16)load_bytes(codes + 64 * v);
        { u8x64 c = (u8x64)(q & 0x0f0f0f0fu); TILED for (int r = 0; r < 3; r++) d[r][i] = dot4(d[r][i], c, load_word(a + r * K + 0)); }
        { u8x64 c = (u8x64)((q >> 4) & 0x0f0f0f0fu); TILED for (int r = 0; r < 3; r++) d[r][i] = dot4(d[r][i], c, load_word(a + r * K + 4)); }
      }
      codes += 256;
      a += 8;
    }
    TILED for (int i = 0; i < 4; i++) {
      f32x16 scale = load_f16((const uint16_t *)p + 16 * (v0 + i * 1));
      TILED for (int r = 0; r < 3; r++) f[r][i] += to_float(d[r][i]) * (scale * xs[(m0 + r) * groups + g]);
    }
  }
  TILED for (int r = 0; r < 3; r++) {
    const long m = m0 + r;
    TILED for (int i = 0; i < 4; i++) {
      const long n = block * COLUMNS + 16 * (v0 + i), count = N - n;
      if (count <= 0) continue;
      f32x16 a = f[r][i];
      a = a + take(bias + n, count);
      a = a + take(residual + m * N + n, count);
      give(y + m * N + n, a, count);
    }
  }
}

INLINE void tile2_5e11ca8963f3fe1c(const int v0, long m0, long block,
    const int8_t *RESTRICT xq, const float *RESTRICT xs, const int32_t *RESTRICT xsum,
    const uint8_t *RESTRICT w, float *RESTRICT y, const float *RESTRICT bias, const float *RESTRICT residual, long N, long K) {
  const long width = WIDTH(K), groups = K / width, size = 192L + width * 32;
  const uint8_t *p = w + block * groups * size;
  f32x16 f[2][4];
  TILED for (int r = 0; r < 2; r++) TILED for (int i = 0; i < 4; i++) f[r][i] = all(0.0f);
  for (long g = 0; g < groups; g++, p += size) {
    i32x16 d[2][4];
    TILED for (int i = 0; i < 4; i++) {
      i32x16 zero = widen(p + 128 + 16 * (v0 + i * 1));
      TILED for (int r = 0; r < 2; r++) d[r][i] = zero * -xsum[(m0 + r) * groups + g];
    }
    const uint8_t *codes = p + 192;
    const int8_t *a = xq + m0 * K + g * width;
    for (long s = 0; s < width; s += 8) {
      TILED for (int i = 0; i < 4; i++) {
        const int v = v0 + i * 1;
        u32x16 q = (u32x16)load_bytes(codes + 64 * v);
        { u8x64 c = (u8x64)(q & 0x0f0f0f0fu); TILED for (int r = 0; r < 2; r++) d[r][i] = dot4(d[r][i], c, load_word(a + r * K + 0)); }
        { u8x64 c = (u8x64)((q >> 4) & 0x0f0f0f0fu); TILED for (int r = 0; r < 2; r++) d[r][i] = dot4(d[r][i], c, load_word(a + r * K + 4)); }
      }
      codes += 256;
      a += 8;
    }
    TILED for (int i = 0; i < 4; i++) {
      f32x16 scale = load_f16((const uint16_t *)p + 16 * (v0 + i * 1));
      TILED for (int r = 0; r < 2; r++) f[r][i] += to_float(d[r][i]) * (scale * xs[(m0 + r) * groups + g]);
    }
  }
  TILED for (int r = 0; r < 2; r++) {
    const long m = m0 + r;
    TILED for (int i = 0; i < 4; i++) {
      const long n = block * COLUMNS + 16 * (v0 + i), count = N - n;
      if (count <= 0) continue;
      f32x16 a = f[r][i];
      a = a + take(bias + n, count);
      a = a + take(residual + m * N + n, count);
      give(y + m * N + n, a, count);
    }
  }
}

INLINE void tile1_5e11ca8963f3fe1c(const int v0, long m0, long block,
    const int8_t *RESTRICT xq, const float *RESTRICT xs, const int32_t *RESTRICT xsum,
    const uint8_t *RESTRICT w, float *RESTRICT y, const float *RESTRICT bias, const float *RESTRICT residual, long N, long K) {
  const long width = WIDTH(K), groups = K / width, size = 192L + width * 32;
  const uint8_t *p = w + block * groups * size;
  f32x16 f[1][4];
  TILED for (int r = 0; r < 1; r++) TILED for (int i = 0; i < 4; i++) f[r][i] = all(0.0f);
  for (long g = 0; g < groups; g++, p += size) {
    i32x16 d[1][4];
    TILED for (int i = 0; i < 4; i++) {
      i32x16 zero = widen(p + 128 + 16 * (v0 + i * 1));
      TILED for (int r = 0; r < 1; r++) d[r][i] = zero * -xsum[(m0 + r) * groups + g];
    }
    const uint8_t *codes = p + 192;
    const int8_t *a = xq + m0 * K + g * width;
    for (long s = 0; s < width; s += 8) {
      TILED for (int i = 0; i < 4; i++) {
        const int v = v0 + i * 1;
        u32x16 q = (u32x16)load_bytes(codes + 64 * v);
        { u8x64 c = (u8x64)(q & 0x0f0f0f0fu); TILED for (int r = 0; r < 1; r++) d[r][i] = dot4(d[r][i], c, load_word(a + r * K + 0)); }
        { u8x64 c = (u8x64)((q >> 4) & 0x0f0f0f0fu); TILED for (int r = 0; r < 1; r++) d[r][i] = dot4(d[r][i], c, load_word(a + r * K + 4)); }
      }
      codes += 256;
      a += 8;
    }
    TILED for (int i = 0; i < 4; i++) {
      f32x16 scale = load_f16((const uint16_t *)p + 16 * (v0 + i * 1));
      TILED for (int r = 0; r < 1; r++) f[r][i] += to_float(d[r][i]) * (scale * xs[(m0 + r) * groups + g]);
    }
  }
  TILED for (int r = 0; r < 1; r++) {
    const long m = m0 + r;
    TILED for (int i = 0; i < 4; i++) {
      const long n = block * COLUMNS + 16 * (v0 + i), count = N - n;
      if (count <= 0) continue;
      f32x16 a = f[r][i];
      a = a + take(bias + n, count);
      a = a + take(residual + m * N + n, count);
      give(y + m * N + n, a, count);
    }
  }
}

#if defined(TILE_LOAD)
static void unpack_5e11ca8963f3fe1c(uint8_t *RESTRICT out, const uint8_t *RESTRICT p, long v, long K) {
  const long width = WIDTH(K), groups = K / width, size = 192L + width * 32;
  for (long g = 0; g < groups; g++, p += size) {
    const uint8_t *codes = p + 192;
    for (long s = 0; s < width; s += 8, out += 128) {
        u32x16 q = (u32x16)load_bytes(codes + 64 * v);
        { u8x64 c = (u8x64)(q & 0x0f0f0f0fu); memcpy(out + 16 * 0, &c, 64); }
        { u8x64 c = (u8x64)((q >> 4) & 0x0f0f0f0fu); memcpy(out + 16 * 4, &c, 64); }
        codes += 256;
    }
  }
}
/* out = results of H rows, of which a is the first, for the 16 channels of vector v; their scales and sums of
   bytes lie side by side, their codes are unpacked */
INLINE void rows_5e11ca8963f3fe1c(const int H, const int8_t *RESTRICT a, const float *RESTRICT scales,
    const int32_t *RESTRICT sums, const uint8_t *p, const uint8_t *RESTRICT codes, long v, long K,
    const uint8_t *next, f32x16 *RESTRICT out) {
  const long width = WIDTH(K), groups = K / width, size = 192L + width * 32;
  i32x16 d[2][16] = {{{0}}};
  f32x16 f[16];
  UNROLL for (int r = 0; r < H; r++) f[r] = all(0.0f);
  for (long g = 0; g < groups; g++, p += size) {
#define SUMS(T) \
    TILE_ZERO(T); \
    for (long s = 0; s < width; s += 64, a += 64, codes += 1024) { \
      TILE_LOAD(4, a, K); TILE_LOAD(5, codes, 64); TILE_DOT_U(T); \
    } \
    TILE_STORE(T, d[T]);
    if (g % 2) { SUMS(1) } else { SUMS(0) }
#undef SUMS
    if (next)
      for (long i = (v * groups + g) * size / 4, end = i + size / 4; i < end; i += 64)
        __builtin_prefetch(next + i, 0, 2);
    const i32x16 zero = -widen(p + 128 + 16 * v);
    const f32x16 scale = load_f16((const uint16_t *)p + 16 * v);
    const i32x16 *e = d[g % 2];
    UNROLL for (int r = 0; r < H; r++) f[r] += to_float(less_zero(e[r], zero, sums + 16 * g + r, 1)) * (scale * scales[16 * g + r]);
  }
  UNROLL for (int r = 0; r < H; r++) out[r * 1] = f[r];
}

static int tiles_5e11ca8963f3fe1c(
    const int8_t *RESTRICT xq, const float *RESTRICT xs, const int32_t *RESTRICT xsum,
    const uint8_t *RESTRICT w, float *RESTRICT y, const float *RESTRICT bias, const float *RESTRICT residual, long M, long N, long K, long first, long last) {
  const long width = WIDTH(K), groups = K / width, size = 192L + width * 32;
  const long count = (M + 15) / 16, R = (M + count - 1) / count;   /* tiles of rows, and rows of each */
  const long rows = 16 * count * groups;
  char *const memory = malloc(8 * rows + 64 * K + 64);
  if (!memory) return 0;
  float *const scales = (float *)(((uintptr_t)memory + 63) / 64 * 64);
  int32_t *const sums = (int32_t *)scales + rows;
  uint8_t *const codes = (uint8_t *)(sums + rows);
  for (long t = 0; t < count; t++)
    for (long r = 0; r < 16; r++) {
      /* the last tile begins early enough to be whole */
      const long m = (t + 1) * R < M ? t * R + r : M - R + r;
      for (long g = 0; g < groups; g++) {
        scales[16 * (t * groups + g) + r] = r < R ? xs[m * groups + g] : 0.0f;
        sums[16 * (t * groups + g) + r] = r < R ? xsum[m * groups + g] : 0;
      }
    }
  tiles_of(R, 64);
  for (long block = first; block < last; block++) {
    const uint8_t *p = w + block * groups * size;
    if (count > 1) for (long v = 0; v < 4; v++) unpack_5e11ca8963f3fe1c(codes + 16 * K * v, p, v, K);
    for (long t = 0; t < count; t++) {
      const long at = t * R, m0 = at + R < M ? at : M - R;
      const uint8_t *next = t || block + 1 == last ? 0 : p + groups * size;
      for (long v0 = 0; v0 < 4; v0++) {
        f32x16 f[16][1];
        for (int i = 0; i < 1; i++) {
          uint8_t *const mine = codes + (count > 1 ? 16 * K * (v0 + 2 * i) : 0);
          if (count == 1) unpack_5e11ca8963f3fe1c(mine, p, v0 + 2 * i, K);   /* used once: they stay near */
#define ROWS(H) \
          rows_5e11ca8963f3fe1c(H, xq + m0 * K, scales + 16 * t * groups, sums + 16 * t * groups, p, mine, \
                     v0 + 2 * i, K, next, f[0] + i)
          if (R > 8) ROWS(16); else ROWS(8);
#undef ROWS
        }
        for (long m = at; m < at + R && m < M; m++) {
          const long r = m - m0;
    TILED for (int i = 0; i < 1; i++) {
      const long n = block * COLUMNS + 16 * (v0 + i), count = N - n;
      if (count <= 0) continue;
      f32x16 a = f[r][i];
      a = a + take(bias + n, count);
      a = a + take(residual + m * N + n, count);
      give(y + m * N + n, a, count);
    }
        }
      }
    }
  }
  TILES_DONE();
  free(memory);
  return 1;
}
#endif

#ifndef WAYS
#define WAYS 6
/* which bucket a number of rows is in: 1, 2, 4, 8, 16, 64 and more */
INLINE int bucket_of(long M) { return (M >= 2) + (M >= 4) + (M >= 8) + (M >= 16) + (M >= 64); }
#endif

#if defined(TILE_LOAD)
static signed char way_5e11ca8963f3fe1c[WAYS] = {0, 0, 1, 1, 1, 1};
#endif
static void quant_linear_5e11ca8963f3fe1c(
    const int8_t *RESTRICT xq, const float *RESTRICT xs, const int32_t *RESTRICT xsum,
    const uint8_t *RESTRICT w, float *RESTRICT y, const float *RESTRICT bias, const float *RESTRICT residual, long M, long N, long K, long first, long last) {
#if defined(TILE_LOAD)
  if (way_5e11ca8963f3fe1c[bucket_of(M)] && 1
      && tiles_5e11ca8963f3fe1c(xq, xs, xsum, w, y, bias, residual, M, N, K, first, last)) return;
#endif
  for (long block = first; block < last; block++) {
    long m = 0;
    for (; m + 6 <= M; m += 6) { tile6_5e11ca8963f3fe1c(0, m, block, xq, xs, xsum, w, y, bias, residual, N, K); tile6_5e11ca8963f3fe1c(2, m, block, xq, xs, xsum, w, y, bias, residual, N, K); }
    for (; m + 3 <= M; m += 3) { tile3_5e11ca8963f3fe1c(0, m, block, xq, xs, xsum, w, y, bias, residual, N, K); }
    for (; m + 2 <= M; m += 2) { tile2_5e11ca8963f3fe1c(0, m, block, xq, xs, xsum, w, y, bias, residual, N, K); }
    for (; m + 1 <= M; m += 1) { tile1_5e11ca8963f3fe1c(0, m, block, xq, xs, xsum, w, y, bias, residual, N, K); }
  }
}
