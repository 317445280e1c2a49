
#undef WIDTH
#undef COLUMNS
#define WIDTH(K) 64L
#define COLUMNS 64L

INLINE void tile6_0d6855819a78d9f8(const int v0, long m0, long block,
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

INLINE void tile3_0d6855819a78d9f8(const int v0, long m0, long block,
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

INLINE void tile1_0d6855819a78d9f8(const int v0, long m0, long block,
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

static void quant_linear_0d6855819a78d9f8(
    const int8_t *RESTRICT xq, const float *RESTRICT xs, const int32_t *RESTRICT xsum,
    const uint8_t *RESTRICT w, float *RESTRICT y, const float *RESTRICT bias, const float *RESTRICT residual, long M, long N, long K, long first, long last) {
  for (long block = first; block < last; block++) {
    long m = 0;
    for (; m + 6 <= M; m += 6) { tile6_0d6855819a78d9f8(0, m, block, xq, xs, xsum, w, y, bias, residual, N, K); tile6_0d6855819a78d9f8(2, m, block, xq, xs, xsum, w, y, bias, residual, N, K); }
    for (; m + 3 <= M; m += 3) { tile3_0d6855819a78d9f8(0, m, block, xq, xs, xsum, w, y, bias, residual, N, K); }
    for (; m + 1 <= M; m += 1) { tile1_0d6855819a78d9f8(0, m, block, xq, xs, xsum, w, y, bias, residual, N, K); }
  }
}
