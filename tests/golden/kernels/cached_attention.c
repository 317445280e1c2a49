
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

INLINE uint16_t nearest_bf16_5be885ea22348ff3(float a) {
  uint32_t bits; memcpy(&bits, &a, 4);
  if (a != a) return (uint16_t)(bits >> 16 | 0x40);   /* rounding could carry a NaN into infinity */
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* y = one head of q or k: normed where asked, its first dimensions turned, times scale */
INLINE void head_5be885ea22348ff3(const float *RESTRICT x, const float *RESTRICT gain, const float *RESTRICT c,
                      const float *RESTRICT s, const float scale, float *RESTRICT y) {
  if (0) {
    f32x16 squares = {0};
    for (long d = 0; d < 64; d += 16) { f32x16 a = take(x + d, 64 - d); squares += a * a; }
    const float inverse = 1.0f / sqrtf(sum_of(squares) * (1.0f / 64) + 0);
    for (long d = 0; d < 64; d++) y[d] = x[d] * inverse * (gain[d] + 0.0f);
  } else {
    for (long d = 0; d < 64; d++) y[d] = x[d];
  }
  for (long i = 0; i < 32; i++) {
    const float a = y[i], b = y[i + 32];
    y[i] = a * c[i] - b * s[i];
    y[i + 32] = b * c[i] + a * s[i];
  }
  if (scale != 1) for (long d = 0; d < 64; d++) y[d] *= scale;
}

/* items in order of 16 rows, kv head, row: the keys of 16 rows share cache lines.
   Rows q [M, H h], k and v [M, Hk h] at their strides; slot, position and the row of the tables, turn [M];
   cosines and sines [*, r / 2], gains [h], none of which is read when the spec does not ask for it
   -> keys [slots, Hk, S / 16, h, 16], values [slots, Hk, S, h'], queries [Hk, M, G, h] */
static void write_cache_5be885ea22348ff3(
    const float *RESTRICT q, const float *RESTRICT k, const float *RESTRICT v,
    long q_stride, long k_stride, long v_stride,
    const int64_t *RESTRICT slot, const int64_t *RESTRICT position, const int64_t *RESTRICT turn,
    const float *RESTRICT cosines, const float *RESTRICT sines,
    const float *RESTRICT q_gain, const float *RESTRICT k_gain,
    float *RESTRICT keys, float *RESTRICT values, float *RESTRICT queries,
    long M, long S, long first, long last) {
  for (long item = first; item < last; item++) {
    const long unit = item / (16 * 2) * 16, size = M - unit < 16 ? M - unit : 16;
    const long j = (item - unit * 2) / size, m = unit + (item - unit * 2) % size;
    const long head = slot[m] * 2 + j, at = position[m];
    const float *c = 32 ? cosines + turn[m] * 32 : 0, *s = 32 ? sines + turn[m] * 32 : 0;
    for (long g = 0; g < 4; g++)
      head_5be885ea22348ff3(q + m * q_stride + (j * 4 + g) * 64, q_gain, c, s, 0.125f,
                queries + ((j * M + m) * 4 + g) * 64);
    float turned[64];
    head_5be885ea22348ff3(k + m * k_stride + j * 64, k_gain, c, s, 1, turned);
    float *to = keys + (head * S + at / 16 * 16) * 64 + at % 16;
    for (long d = 0; d < 64; d++) to[16 * d] = (turned[d]);
    const float *from = v + m * v_stride + j * 64;
    to = values + (head * S + at) * 64;
    for (long d = 0; d < 64; d++) to[d] = (from[d]);
    for (long d = 64; d < 64; d++) to[d] = 0;
  }
}

/* tiles: query rows, 16s of keys that they are scored against, 16s of values that they weigh; a sum takes its
   products one by one, so its bits are the same in any tile */
#undef TILES_OF_ROWS
#if defined(__AVX512F__)
#define TILES_OF_ROWS(EACH) EACH(8, 2, 2) EACH(4, 2, 4) EACH(1, 4, 8)
#elif defined(__AVX2__)
#define TILES_OF_ROWS(EACH) EACH(4, 1, 1) EACH(1, 4, 4)
#else
#define TILES_OF_ROWS(EACH) EACH(2, 1, 1) EACH(1, 2, 2)
#endif

/* p [P, 64] = q [P, 64] times 16 B keys */
INLINE void score_5be885ea22348ff3(const int P, const int B, const float *RESTRICT q, const float *RESTRICT k, long ahead,
                       float *RESTRICT p) {
  part a[8][4][PARTS];
  UNROLL for (int i = 0; i < P; i++)
    UNROLL for (int b = 0; b < B; b++) UNROLL for (int l = 0; l < PARTS; l++) a[i][b][l] = (part){0};
  for (long d = 0; d < 64; d++) {
    part w[4][PARTS];
    UNROLL for (int b = 0; b < B; b++) UNROLL for (int l = 0; l < PARTS; l++) {
      w[b][l] = part_float32(k + (b * 64 + d) * 16 + l * LANES);
      if (P > 1) LOADED(w[b][l]);
      if (l == 0) __builtin_prefetch(k + (b * 64 + d) * 16 + ahead, 0, 2);
    }
    UNROLL for (int i = 0; i < P; i++) {
      part x = part_all(q[i * 64 + d]);
      LOADED(x);
      UNROLL for (int b = 0; b < B; b++) UNROLL for (int l = 0; l < PARTS; l++) a[i][b][l] += w[b][l] * x;
    }
  }
  UNROLL for (int i = 0; i < P; i++)
    UNROLL for (int b = 0; b < B; b++) UNROLL for (int l = 0; l < PARTS; l++)
      memcpy(p + i * 64 + 16 * b + l * LANES, &a[i][b][l], sizeof(part));
}

/* y [P, 16 V of 64] += p [P, 64] times `count` values */
INLINE void weigh_5be885ea22348ff3(const int P, const int V, const float *RESTRICT p, const float *RESTRICT v, long ahead,
                       long count, float *RESTRICT y) {
  part a[8][8][PARTS];
  UNROLL for (int i = 0; i < P; i++)
    UNROLL for (int x = 0; x < V; x++) UNROLL for (int l = 0; l < PARTS; l++)
      a[i][x][l] = part_float32(y + i * 64 + 16 * x + l * LANES);
  for (long n = 0; n < count; n++) {
    part w[8][PARTS];
    UNROLL for (int x = 0; x < V; x++) UNROLL for (int l = 0; l < PARTS; l++) {
      w[x][l] = part_float32(v + n * 64 + 16 * x + l * LANES);
      if (P > 1) LOADED(w[x][l]);
      if (l == 0) __builtin_prefetch(v + n * 64 + 16 * x + ahead, 0, 2);
    }
    UNROLL for (int i = 0; i < P; i++) {
      part one = part_all(p[i * 64 + n]);
      LOADED(one);
      UNROLL for (int x = 0; x < V; x++) UNROLL for (int l = 0; l < PARTS; l++) a[i][x][l] += w[x][l] * one;
    }
  }
  UNROLL for (int i = 0; i < P; i++)
    UNROLL for (int x = 0; x < V; x++) UNROLL for (int l = 0; l < PARTS; l++)
      memcpy(y + i * 64 + 16 * x + l * LANES, &a[i][x][l], sizeof(part));
}

/* rows 0 to P of q against the keys from..to of one step, in whole vectors */
static void scores_5be885ea22348ff3(long P, const float *RESTRICT q, const float *RESTRICT k, long ahead,
                        long from, long to, float *RESTRICT p) {
  long i = 0;
#define EACH(ROWS, B, V) \
  for (; i + ROWS <= P; i += ROWS) \
    for (long n = from / (16 * B) * (16 * B); n < to; n += 16 * B) \
      score_5be885ea22348ff3(ROWS, B, q + i * 64, k + n * 64, i ? 0 : ahead * 64, p + i * 64 + n);
  TILES_OF_ROWS(EACH)
#undef EACH
}

/* rows 0 to P of y take the values from..to of one step */
static void sums_5be885ea22348ff3(long P, const float *RESTRICT p, const float *RESTRICT v, long ahead,
                      long from, long to, float *RESTRICT y) {
  if (from >= to) return;
  long i = 0;
  p += from;
  v += from * 64;
#define SOME(ROWS, V) \
  for (; x + V <= 4; x += V) \
    weigh_5be885ea22348ff3(ROWS, V, p + i * 64, v + 16 * x, i ? 0 : ahead * 64, to - from, \
               y + i * 64 + 16 * x);
#define EACH(ROWS, B, V) \
  for (; i + ROWS <= P; i += ROWS) { long x = 0; SOME(ROWS, V) if (V > 4) SOME(ROWS, 4) SOME(ROWS, 1) }
  TILES_OF_ROWS(EACH)
#undef EACH
#undef SOME
}

INLINE float most_of_5be885ea22348ff3(f32x16 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float s[16];
  memcpy(s, &v, sizeof v);
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; i++) s[i] = s[i] > s[i + width] ? s[i] : s[i + width];
  return s[0];
#endif
}

/* e^v for v below 20, 0 below -87.7: shorter than `exponential`, with the same polynomial */
INLINE f32x16 weight_5be885ea22348ff3(f32x16 v) {
  const f32x16 x = choose(v < -100.0f, all(-100.0f), v), t = x * 1.44269504088896341f + 12582912.0f;
  const f32x16 n = t - 12582912.0f, r = x - n * 0.693359375f + n * 2.12194440e-4f;
  const i32x16 e = (i32x16)t - 0x4b400000;   /* 12582912 = 1.5 * 2^23 leaves n in the last bits of t */
  f32x16 p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * (f32x16)(((e + 127) << 23) & (e > -127));
}

/* scores from..to of one step become weights e^(score - base), the others 0. The base is the largest score of
   the first step; it follows later ones when they pass it by 16, so that no weight passes 2^24 */
INLINE void soften_5be885ea22348ff3(float *RESTRICT p, const int whole, long from, long to, float *RESTRICT base,
                        f32x16 *RESTRICT total, float *RESTRICT sum) {
  const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  f32x16 s[64 / 16], top = all(-INFINITY);
  UNROLL for (int b = 0; b < 64 / 16; b++) {
    f32x16 a = load(p + 16 * b);
    
    const i32x16 n = lanes + 16 * b;
    s[b] = whole ? a : choose((n >= (int)from) & (n < (int)to), a, all(-INFINITY));
    top = larger(s[b], top);   /* passes over what is not a number; its weight will not be one */
  }
  const float most = most_of_5be885ea22348ff3(top), before = *base;
  if (most > before + 16) {
    *base = most;
    if (before > -INFINITY) {
      const float shrink = exponential(all(before - most))[0];
      *total *= shrink;
      for (long d = 0; d < 64; d += 16) store(sum + d, load(sum + d) * shrink);
    }
  }
  const float less = *base == -INFINITY ? 0 : *base;
  f32x16 sum_of_all = *total;
  UNROLL for (int b = 0; b < 64 / 16; b++) {
    const f32x16 e = weight_5be885ea22348ff3(s[b] - less);
    sum_of_all += e;
    store(p + 16 * b, e);
  }
  *total = sum_of_all;
}

/* the first key that a token sees, down to a whole step */
INLINE long start_5be885ea22348ff3(long position) {
  return 0 && position >= 0 ? (position - 0 + 1) / 64 * 64 : 0;
}

/* 4 queries of each of n tokens, at `position` and after it, of one sequence, whose keys begin at number
   `head` of all; y is the first token's. `next` is the first key that is read afterwards, -1 for none */
static void together_5be885ea22348ff3(const float *RESTRICT q, const float *RESTRICT keys, const float *RESTRICT values,
                          long S, long head, long next, long position, long n, float *RESTRICT y) {
  float p[16 * 64], sum[16 * 64], base_of[16];
  f32x16 total[16];
  const long P = n * 4, end = position + n;
  for (long i = 0; i < P; i++) { base_of[i] = -INFINITY; total[i] = all(0.0f); }
  memset(sum, 0, sizeof(float) * P * 64);
  for (long base = start_5be885ea22348ff3(position); base < end; base += 64) {
    const long chunk = head + base;
    const float *k = keys + chunk * 64, *v = values + chunk * 64;
    /* what comes next is asked for while this is used */
    const long ahead = base + 64 < end ? 64 : next < 0 ? 0 : next - chunk;
    long from[4], to[4];
    for (long t = 0; t < n; t++) {
      const long lowest = 0 ? position + t - 0 + 1 - base : 0, above = position + t + 1 - base;
      from[t] = lowest > 0 ? lowest : 0;
      to[t] = above < 64 ? above : 64;
    }
    scores_5be885ea22348ff3(P, q, k, ahead, from[0], to[n - 1], p);
    for (long t = 0; t < n; t++)
      for (long i = t * 4; i < (t + 1) * 4; i++)
        if (from[t] == 0 && to[t] == 64)
          soften_5be885ea22348ff3(p + i * 64, 1, 0, 64, base_of + i, total + i, sum + i * 64);
        else if (from[t] < to[t])
          soften_5be885ea22348ff3(p + i * 64, 0, from[t], to[t], base_of + i, total + i, sum + i * 64);
    /* keys that all tokens see are summed together, those before and after for each token */
    const long low = from[n - 1], high = to[0] > low ? to[0] : low;
#define ALONE(first, last) \
  for (long t = 0; t < n; t++) \
    sums_5be885ea22348ff3(4, p + t * 4 * 64, v, 0, first, last, sum + t * 4 * 64);
    ALONE(from[t], to[t] < low ? to[t] : low)
    sums_5be885ea22348ff3(P, p, v, ahead, low, high, sum);
    ALONE(from[t] > high ? from[t] : high, to[t])
#undef ALONE
  }
  for (long i = 0; i < P; i++) {
    const float all_of = sum_of(total[i]);
    float *out = y + (i / 4 * 2 * 4 + i % 4) * 64;
    for (long d = 0; d < 64; d += 16) give(out + d, load(sum + i * 64 + d) / all_of, 64 - d);
  }
}

/* the row that is number i of M: units of 4, the first, the last, the second, the last but one, ... */
INLINE long row_5be885ea22348ff3(long i, long M) {
  const long units = (M + 4 - 1) / 4, tail = M - (units - 1) * 4;
  const long even = i < 4 + tail ? i : i + 4 - tail, turn = even / 4;
  return (turn % 2 ? units - 1 - turn / 2 : turn / 2) * 4 + even % 4;
}

/* queries, keys and values as write_cache left them -> y [M, H h]; item i is row i % M (in an order that
   gives equal shares of a prefill equal work) of kv head i / M. Tokens that follow each other go together. */
static void attend_5be885ea22348ff3(
    const float *RESTRICT queries, const float *RESTRICT keys, const float *RESTRICT values,
    const int64_t *RESTRICT slot, const int64_t *RESTRICT position, float *RESTRICT y,
    long M, long S, long first, long last) {
  for (long item = first; item < last;) {
    const long j = item / M, m = row_5be885ea22348ff3(item % M, M), over = (m / 4 + 1) * 4;
    long n = 1;
    while (m + n < (over < M ? over : M) && item + n < last
           && slot[m + n] == slot[m] && position[m + n] == position[m] + n) n++;
    const long then = item + n, r = row_5be885ea22348ff3(then % M, M), begin = start_5be885ea22348ff3(position[r]);
    const long next = then < last ? (slot[r] * 2 + then / M) * S + begin : -1;
    together_5be885ea22348ff3(queries + (j * M + m) * 4 * 64, keys, values, S, (slot[m] * 2 + j) * S, next,
                  position[m], n, y + (m * 2 + j) * 4 * 64);
    item = then;
  }
}
