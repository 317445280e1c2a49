
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

#ifndef TILES
#define TILES
/* rows of x, and rows of W for each of them, that the registers hold sums for */
#if defined(__AVX512F__)
#define MOST_ROWS 6
#define ROWS_OF_W(R) ((R) <= 3 ? 8 : 4)
#elif defined(__AVX2__)
#define MOST_ROWS 3
#define ROWS_OF_W(R) ((R) <= 1 ? 4 : 2)
#else
#define MOST_ROWS 2
#define ROWS_OF_W(R) ((R) <= 1 ? 2 : 1)
#endif
typedef float f32x8 __attribute__((vector_size(32)));
#if defined(__clang__)
#define MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t i32x8 __attribute__((vector_size(32)));
#define MIX(a, b, ...) __builtin_shuffle(a, b, (i32x8){__VA_ARGS__})
#endif
INLINE f32x8 fold(const float *s) {
  f32x8 half[2];
  memcpy(half, s, sizeof half);
  return half[0] + half[1];
}
/* lane j = sum of s[j]; always in the same order */
INLINE f32x16 sums_of(const float s[16][16]) {
  f32x8 out[2];
  for (int h = 0; h < 2; h++) {
    f32x8 a[8], b[4], c[2];
    UNROLL for (int j = 0; j < 8; j++) a[j] = fold(s[8 * h + j]);
    UNROLL for (int j = 0; j < 4; j++)
      b[j] = MIX(a[2 * j], a[2 * j + 1], 0, 8, 2, 10, 4, 12, 6, 14)
           + MIX(a[2 * j], a[2 * j + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    UNROLL for (int j = 0; j < 2; j++)
      c[j] = MIX(b[2 * j], b[2 * j + 1], 0, 1, 8, 9, 4, 5, 12, 13)
           + MIX(b[2 * j], b[2 * j + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    out[h] = MIX(c[0], c[1], 0, 1, 2, 3, 8, 9, 10, 11) + MIX(c[0], c[1], 4, 5, 6, 7, 12, 13, 14, 15);
  }
  f32x16 v;
  memcpy(&v, out, sizeof v);
  return v;
}
#endif

#ifndef SIXTEEN_bfloat16
#define SIXTEEN_bfloat16
/* acc[r][c] += x[r] w[c] over columns k to k + 16 of R rows of x and C of W */
INLINE void step_bfloat16(const int R, const int C, const float *x, const stored_bfloat16 *const *row,
    long k, long K, part acc[MOST_ROWS][8][PARTS]) {
  UNROLL for (int p = 0; p < PARTS; p++) {
    part a[MOST_ROWS];
    UNROLL for (int r = 0; r < R; r++) a[r] = part_float32(x + r * K + k + LANES * p);
    UNROLL for (int c = 0; c < C; c++) {
      part b = part_bfloat16(row[c] + k + LANES * p);
      if (R > 1) LOADED(b);
      UNROLL for (int r = 0; r < R; r++) acc[r][c][p] += a[r] * b;
    }
  }
}

/* R rows of x times rows n to n + 15 of W, C at a time; past the last row of W it is read again. With many
   rows of x columns go in chunks, so that the rows stay near; sums go on in the same order */
INLINE void tile_bfloat16(const int R, const float *RESTRICT x, const stored_bfloat16 *RESTRICT w,
    long n, long N, long K, f32x16 *RESTRICT out) {
  const int C = ROWS_OF_W(R);
  const long whole = K / 16 * 16, chunk = R > 3 ? 512 : whole;
  float s[MOST_ROWS][16][16] = {{{0}}};
  for (long from = 0; from < whole; from += chunk)
    for (int c0 = 0; c0 < 16; c0 += C) {
      const long end = from + chunk < whole ? from + chunk : whole;
      const stored_bfloat16 *row[8];
      part acc[MOST_ROWS][8][PARTS];
      UNROLL for (int c = 0; c < C; c++) row[c] = w + (n + c0 + c < N ? n + c0 + c : N - 1) * K;
      UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++) memcpy(acc[r][c], s[r][c0 + c], sizeof acc[r][c]);
      long k = from;
      for (; k + 32 <= end; k += 32) {
        if (R <= 3) UNROLL for (int c = 0; c < C; c++) __builtin_prefetch(row[c] + C * K + k);
        UNROLL for (int u = 0; u < 32; u += 16) step_bfloat16(R, C, x, row, k + u, K, acc);
      }
      if (k + 16 <= end) { step_bfloat16(R, C, x, row, k, K, acc); k += 16; }
      UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++) memcpy(s[r][c0 + c], acc[r][c], sizeof acc[r][c]);
    }
  if (whole < K)
    for (int c = 0; c < 16; c++) {
      const f32x16 b = take_bfloat16(w + (n + c < N ? n + c : N - 1) * K + whole, K - whole);
      for (int r = 0; r < R; r++)
        store(s[r][c], load(s[r][c]) + take(x + r * K + whole, K - whole) * b);
    }
  for (int r = 0; r < R; r++) out[r] = sums_of(s[r]);
}

static __attribute__((noinline)) void sixteen_bfloat16(long rows, const float *RESTRICT x,
    const stored_bfloat16 *RESTRICT w, long n, long N, long K, f32x16 *RESTRICT out) {
  switch (rows) {
#if MOST_ROWS > 3
    case 6: tile_bfloat16(6, x, w, n, N, K, out); break;
    case 5: tile_bfloat16(5, x, w, n, N, K, out); break;
    case 4: tile_bfloat16(4, x, w, n, N, K, out); break;
#endif
#if MOST_ROWS > 2
    case 3: tile_bfloat16(3, x, w, n, N, K, out); break;
#endif
    case 2: tile_bfloat16(2, x, w, n, N, K, out); break;
    default: tile_bfloat16(1, x, w, n, N, K, out);
  }
}
#endif

#ifndef PANELS_bfloat16
#define PANELS_bfloat16
#ifndef PANELS
#define PANELS
#include <stdlib.h>
enum { WIDE = 64, CHUNK = 1024, WAITING = 96 };
#if defined(__AVX512F__)
enum { TILE_ROWS = 6, TILE_PARTS = 4 };
#elif defined(__AVX2__)
enum { TILE_ROWS = 6, TILE_PARTS = 2 };
#else
enum { TILE_ROWS = 2, TILE_PARTS = 2 };
#endif
/* rows 0 to 15 of a matrix become its columns */
INLINE void turned(f32x16 *RESTRICT v) {
#if defined(__AVX512F__)
  __m512 a[16], b[16];
  UNROLL for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps((__m512)v[i], (__m512)v[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps((__m512)v[i], (__m512)v[i + 1]);
  }
  UNROLL for (int i = 0; i < 16; i += 4)
    UNROLL for (int j = 0; j < 2; j++) {
      b[i + 2 * j] = (__m512)_mm512_unpacklo_pd((__m512d)a[i + j], (__m512d)a[i + j + 2]);
      b[i + 2 * j + 1] = (__m512)_mm512_unpackhi_pd((__m512d)a[i + j], (__m512d)a[i + j + 2]);
    }
  UNROLL for (int j = 0; j < 4; j++) {
    const __m512 even = _mm512_shuffle_f32x4(b[j], b[4 + j], 0x88);
    const __m512 odd = _mm512_shuffle_f32x4(b[j], b[4 + j], 0xdd);
    const __m512 next = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0x88);
    const __m512 last = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0xdd);
    v[j] = (f32x16)_mm512_shuffle_f32x4(even, next, 0x88);
    v[8 + j] = (f32x16)_mm512_shuffle_f32x4(even, next, 0xdd);
    v[4 + j] = (f32x16)_mm512_shuffle_f32x4(odd, last, 0x88);
    v[12 + j] = (f32x16)_mm512_shuffle_f32x4(odd, last, 0xdd);
  }
#else
  float from[16][16], to[16][16];
  memcpy(from, v, sizeof from);
  for (int i = 0; i < 16; i++) for (int j = 0; j < 16; j++) to[j][i] = from[i][j];
  memcpy(v, to, sizeof to);
#endif
}
/* one phase of a chunk: sums [6, 64] += x [6, n columns 16 apart] times w [n, 64], n > 0; of the first
   chunk sums begin here */
INLINE void phase(const int R, const int first, const float *RESTRICT x, const float *RESTRICT w, long n,
                  long K, float *RESTRICT sums) {
  for (int from = 0; from < WIDE; from += TILE_PARTS * LANES) {
    part acc[TILE_ROWS][TILE_PARTS];
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int c = 0; c < TILE_PARTS; c++)
        acc[r][c] = first ? (part){0} : part_float32(sums + r * WIDE + from + c * LANES);
    long i = 0;
    do {
      part b[TILE_PARTS];
      UNROLL for (int c = 0; c < TILE_PARTS; c++) {
        b[c] = part_float32(w + i * WIDE + from + c * LANES);
        LOADED(b[c]);
      }
      UNROLL for (int r = 0; r < R; r++) {
        part a = part_all(x[r * K + 16 * i]);
        LOADED(a);
        UNROLL for (int c = 0; c < TILE_PARTS; c++) acc[r][c] += a * b[c];
      }
    } while (++i < n);
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int c = 0; c < TILE_PARTS; c++)
        memcpy(sums + r * WIDE + from + c * LANES, &acc[r][c], sizeof(part));
  }
}
/* sums of 16 phases [16, 6, 64] -> results [6, 64], in the order in which `sums_of` adds lanes */
INLINE void phases_added(const float *RESTRICT s, const int R, float *RESTRICT out) {
  const long by = TILE_ROWS * WIDE;
  for (int at = 0; at < R * WIDE; at += LANES) {
    part v[8];
    UNROLL for (int i = 0; i < 8; i++)
      v[i] = part_float32(s + i * by + at) + part_float32(s + (i + 8) * by + at);
    UNROLL for (int i = 0; i < 8; i += 2) v[i] += v[i + 1];
    v[0] += v[2];
    v[4] += v[6];
    v[0] += v[4];
    memcpy(out + at, v, sizeof(part));
  }
}
/* the chunk of columns at `from` times one panel, into the sums of R rows */
INLINE void chunk_of(const int R, const float *RESTRICT x, const float *RESTRICT panel, long from, long K,
                     float *RESTRICT s) {
  const long end = from + CHUNK < K ? from + CHUNK : K, each = (end - from + 15) / 16;
  for (int p = 0; p < 16; p++, s += TILE_ROWS * WIDE) {
    const float *w = panel + (from + p * each) * WIDE;
    const long n = (end - from - p + 15) / 16;
    if (from + p >= end) { if (from == 0) memset(s, 0, sizeof(float) * R * WIDE); }
    else if (from == 0) phase(R, 1, x + p, w, n, K, s);
    else phase(R, 0, x + from + p, w, n, K, s);
  }
}
static __attribute__((noinline)) void rows_of(long rows, const float *RESTRICT x, const float *RESTRICT panel,
                                              long from, long K, float *RESTRICT s) {
  if (rows == TILE_ROWS) { chunk_of(TILE_ROWS, x, panel, from, K, s); return; }
  for (long r = 0; r < rows; r++) chunk_of(1, x + r * K, panel, from, K, s + r * WIDE);
}
#endif
/* channels n to n + 63 of w, past its last that one again; each chunk [16 phases, columns / 16, 64] */
static void panel_bfloat16(const stored_bfloat16 *RESTRICT w, long n, long N, long K, float *RESTRICT out) {
  for (long from = 0; from < K; from += CHUNK) {
    const long end = from + CHUNK < K ? from + CHUNK : K, each = (end - from + 15) / 16;
    float *to = out + from * WIDE;
    for (long k = from; k < end; k += 16)
      for (int c = 0; c < WIDE; c += 16) {
        f32x16 v[16];
        for (int i = 0; i < 16; i++)
          v[i] = take_bfloat16(w + (n + c + i < N ? n + c + i : N - 1) * K + k, end - k);
        turned(v);
        for (int p = 0; p < 16; p++) store(to + (p * each + (k - from) / 16) * WIDE + c, v[p]);
      }
  }
}
#endif

/* blocks first to last for M rows; 0 when there is no memory for panels */
static int panels_c60b4e0e31555720(const float *RESTRICT x, const stored_bfloat16 *RESTRICT w,
    const stored_bfloat16 *RESTRICT w2, float *RESTRICT y, long M, long N, long K, long first, long last) {
  const long columns = (K + 15) / 16 * 16, sums = 16 * TILE_ROWS * WIDE;
  const long tiles = K > CHUNK ? WAITING / TILE_ROWS : 1;
  float *const memory = malloc(sizeof(float) * 1 * (WIDE * columns + tiles * sums) + 64);
  if (!memory) return 0;
  float *const panel = (float *)(((uintptr_t)memory + 63) / 64 * 64);
  float *const s = panel + 1 * WIDE * columns;
  for (long block = first; block < last; block += WIDE / 16) {
    const long n0 = block * 16, rest = (last - block) * 16, wide = rest < WIDE ? rest : WIDE;
    panel_bfloat16(w, n0, N, K, panel);
    for (long some = 0; some < M; some += tiles * TILE_ROWS)
      for (long from = 0; from < K; from += CHUNK)
        for (long t = 0; t < tiles && some + t * TILE_ROWS < M; t++) {
          const long m0 = some + t * TILE_ROWS, rows = M - m0 < TILE_ROWS ? M - m0 : TILE_ROWS;
          rows_of(rows, x + m0 * K, panel, from, K, s + t * sums);
          if (from + CHUNK < K) continue;
          float one[TILE_ROWS * WIDE];
          phases_added(s + t * sums, rows, one);
          for (long r = 0; r < rows; r++)
            for (long c = 0; c < wide && n0 + c < N; c += 16) {
              const long m = m0 + r, n = n0 + c, count = N - n;
              f32x16 a = load(one + r * WIDE + c);

              give(y + m * N + n, a, count);
            }
        }
  }
  free(memory);
  return 1;
}

static void dense_linear_c60b4e0e31555720(const float *RESTRICT x, const stored_bfloat16 *RESTRICT w,
    const stored_bfloat16 *RESTRICT w2, float *RESTRICT y,
    long M, long N, long K, long first, long last) {
  if (M >= 64 && panels_c60b4e0e31555720(x, w, w2, y, M, N, K, first, last)) return;
  for (long n = first * 16; n < last * 16; n += 16) {
    const long count = N - n;
    for (long m0 = 0; m0 < M; m0 += MOST_ROWS) {
      const long rows = M - m0 < MOST_ROWS ? M - m0 : MOST_ROWS;
      f32x16 sums[MOST_ROWS];
      sixteen_bfloat16(rows, x + m0 * K, w, n, N, K, sums);
      for (long r = 0; r < rows; r++) {
        const long m = m0 + r;
        f32x16 a = sums[r];
        give(y + m * N + n, a, count);
      }
    }
  }
}
