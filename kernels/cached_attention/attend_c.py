"""The C text that attends: scores by 16 keys, a running softmax over steps of 64, weighted sums of values."""

from __future__ import annotations

from string import Template

ATTEND = Template(r"""
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

/* p [P, $step] = q [P, $h] times 16 B keys */
INLINE void score_$key(const int P, const int B, const float *RESTRICT q, const $cell *RESTRICT k, long ahead,
                       float *RESTRICT p) {
  part a[8][4][PARTS];
  UNROLL for (int i = 0; i < P; i++)
    UNROLL for (int b = 0; b < B; b++) UNROLL for (int l = 0; l < PARTS; l++) a[i][b][l] = (part){0};
  for (long d = 0; d < $h; d++) {
    part w[4][PARTS];
    UNROLL for (int b = 0; b < B; b++) UNROLL for (int l = 0; l < PARTS; l++) {
      w[b][l] = $load(k + (b * $h + d) * 16 + l * LANES);
      if (P > 1) LOADED(w[b][l]);
      if (l == 0) __builtin_prefetch(k + (b * $h + d) * 16 + ahead, 0, 2);
    }
    UNROLL for (int i = 0; i < P; i++) {
      part x = part_all(q[i * $h + d]);
      LOADED(x);
      UNROLL for (int b = 0; b < B; b++) UNROLL for (int l = 0; l < PARTS; l++) a[i][b][l] += w[b][l] * x;
    }
  }
  UNROLL for (int i = 0; i < P; i++)
    UNROLL for (int b = 0; b < B; b++) UNROLL for (int l = 0; l < PARTS; l++)
      memcpy(p + i * $step + 16 * b + l * LANES, &a[i][b][l], sizeof(part));
}

/* y [P, 16 V of $padded] += p [P, $step] times `count` values */
INLINE void weigh_$key(const int P, const int V, const float *RESTRICT p, const $cell *RESTRICT v, long ahead,
                       long count, float *RESTRICT y) {
  part a[8][8][PARTS];
  UNROLL for (int i = 0; i < P; i++)
    UNROLL for (int x = 0; x < V; x++) UNROLL for (int l = 0; l < PARTS; l++)
      a[i][x][l] = part_float32(y + i * $padded + 16 * x + l * LANES);
  for (long n = 0; n < count; n++) {
    part w[8][PARTS];
    UNROLL for (int x = 0; x < V; x++) UNROLL for (int l = 0; l < PARTS; l++) {
      w[x][l] = $load(v + n * $padded + 16 * x + l * LANES);
      if (P > 1) LOADED(w[x][l]);
      if (l == 0) __builtin_prefetch(v + n * $padded + 16 * x + ahead, 0, 2);
    }
    UNROLL for (int i = 0; i < P; i++) {
      part one = part_all(p[i * $step + n]);
      LOADED(one);
      UNROLL for (int x = 0; x < V; x++) UNROLL for (int l = 0; l < PARTS; l++) a[i][x][l] += w[x][l] * one;
    }
  }
  UNROLL for (int i = 0; i < P; i++)
    UNROLL for (int x = 0; x < V; x++) UNROLL for (int l = 0; l < PARTS; l++)
      memcpy(y + i * $padded + 16 * x + l * LANES, &a[i][x][l], sizeof(part));
}

/* rows 0 to P of q against the keys from..to of one step, in whole vectors */
static void scores_$key(long P, const float *RESTRICT q, const $cell *RESTRICT k, long ahead,
                        long from, long to, float *RESTRICT p) {
  long i = 0;
#define EACH(ROWS, B, V) \
  for (; i + ROWS <= P; i += ROWS) \
    for (long n = from / (16 * B) * (16 * B); n < to; n += 16 * B) \
      score_$key(ROWS, B, q + i * $h, k + n * $h, i ? 0 : ahead * $h, p + i * $step + n);
  TILES_OF_ROWS(EACH)
#undef EACH
}

/* rows 0 to P of y take the values from..to of one step */
static void sums_$key(long P, const float *RESTRICT p, const $cell *RESTRICT v, long ahead,
                      long from, long to, float *RESTRICT y) {
  if (from >= to) return;
  long i = 0;
  p += from;
  v += from * $padded;
#define SOME(ROWS, V) \
  for (; x + V <= $vectors; x += V) \
    weigh_$key(ROWS, V, p + i * $step, v + 16 * x, i ? 0 : ahead * $padded, to - from, \
               y + i * $padded + 16 * x);
#define EACH(ROWS, B, V) \
  for (; i + ROWS <= P; i += ROWS) { long x = 0; SOME(ROWS, V) if (V > 4) SOME(ROWS, 4) SOME(ROWS, 1) }
  TILES_OF_ROWS(EACH)
#undef EACH
#undef SOME
}

INLINE float most_of_$key(f32x16 v) {
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
INLINE f32x16 weight_$key(f32x16 v) {
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
INLINE void soften_$key(float *RESTRICT p, const int whole, long from, long to, float *RESTRICT base,
                        f32x16 *RESTRICT total, float *RESTRICT sum) {
  const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  f32x16 s[$step / 16], top = all(-INFINITY);
  UNROLL for (int b = 0; b < $step / 16; b++) {
    f32x16 a = load(p + 16 * b);
    $cap
    const i32x16 n = lanes + 16 * b;
    s[b] = whole ? a : choose((n >= (int)from) & (n < (int)to), a, all(-INFINITY));
    top = larger(s[b], top);   /* passes over what is not a number; its weight will not be one */
  }
  const float most = most_of_$key(top), before = *base;
  if (most > before + 16) {
    *base = most;
    if (before > -INFINITY) {
      const float shrink = exponential(all(before - most))[0];
      *total *= shrink;
      for (long d = 0; d < $padded; d += 16) store(sum + d, load(sum + d) * shrink);
    }
  }
  const float less = *base == -INFINITY ? 0 : *base;
  f32x16 sum_of_all = *total;
  UNROLL for (int b = 0; b < $step / 16; b++) {
    const f32x16 e = weight_$key(s[b] - less);
    sum_of_all += e;
    store(p + 16 * b, e);
  }
  *total = sum_of_all;
}

/* the first key that a token sees, down to a whole step */
INLINE long start_$key(long position) {
  return $window && position >= $window ? (position - $window + 1) / $step * $step : 0;
}

/* $group queries of each of n tokens, at `position` and after it, of one sequence, whose keys begin at number
   `head` of all; y is the first token's. `next` is the first key that is read afterwards, -1 for none */
static void together_$key(const float *RESTRICT q, const $cell *RESTRICT keys, const $cell *RESTRICT values,
                          long S, long head, long next, long position, long n, float *RESTRICT y) {
  float p[$rows * $step], sum[$rows * $padded], base_of[$rows];
  f32x16 total[$rows];
  const long P = n * $group, end = position + n;
  for (long i = 0; i < P; i++) { base_of[i] = -INFINITY; total[i] = all(0.0f); }
  memset(sum, 0, sizeof(float) * P * $padded);
  for (long base = start_$key(position); base < end; base += $step) {
    const long chunk = head + $chunk;
    const $cell *k = keys + chunk * $h, *v = values + chunk * $padded;
    /* what comes next is asked for while this is used */
    const long ahead = base + $step < end ? $step : next < 0 ? 0 : next - chunk;
    long from[$tokens], to[$tokens];
    for (long t = 0; t < n; t++) {
      const long lowest = $window ? position + t - $window + 1 - base : 0, above = position + t + 1 - base;
      from[t] = lowest > 0 ? lowest : 0;
      to[t] = above < $step ? above : $step;
    }
    scores_$key(P, q, k, ahead, from[0], to[n - 1], p);
    for (long t = 0; t < n; t++)
      for (long i = t * $group; i < (t + 1) * $group; i++)
        if (from[t] == 0 && to[t] == $step)
          soften_$key(p + i * $step, 1, 0, $step, base_of + i, total + i, sum + i * $padded);
        else if (from[t] < to[t])
          soften_$key(p + i * $step, 0, from[t], to[t], base_of + i, total + i, sum + i * $padded);
    /* keys that all tokens see are summed together, those before and after for each token */
    const long low = from[n - 1], high = to[0] > low ? to[0] : low;
#define ALONE(first, last) \
  for (long t = 0; t < n; t++) \
    sums_$key($group, p + t * $group * $step, v, 0, first, last, sum + t * $group * $padded);
    ALONE(from[t], to[t] < low ? to[t] : low)
    sums_$key(P, p, v, ahead, low, high, sum);
    ALONE(from[t] > high ? from[t] : high, to[t])
#undef ALONE
  }
  for (long i = 0; i < P; i++) {
    const float all_of = sum_of(total[i]);
    float *out = y + (i / $group * $kv_heads * $group + i % $group) * $h;
    for (long d = 0; d < $h; d += 16) give(out + d, load(sum + i * $padded + d) / all_of, $h - d);
  }
}

/* the row that is number i of M: units of $tokens, the first, the last, the second, the last but one, ... */
INLINE long row_$key(long i, long M) {
  const long units = (M + $tokens - 1) / $tokens, tail = M - (units - 1) * $tokens;
  const long even = i < $tokens + tail ? i : i + $tokens - tail, turn = even / $tokens;
  return (turn % 2 ? units - 1 - turn / 2 : turn / 2) * $tokens + even % $tokens;
}

/* queries, keys and values as write_cache left them -> y [M, H h]; item i is row i % M (in an order that
   gives equal shares of a prefill equal work) of kv head i / M. Tokens that follow each other go together. */
static void attend_$key(
    const float *RESTRICT queries, const $cell *RESTRICT keys, const $cell *RESTRICT values,
    const int64_t *RESTRICT slot, const int64_t *RESTRICT position, float *RESTRICT y,
    long M, long S, long first, long last) {
  for (long item = first; item < last;) {
    const long j = item / M, m = row_$key(item % M, M), over = (m / $tokens + 1) * $tokens;
    long n = 1;
    while (m + n < (over < M ? over : M) && item + n < last
           && slot[m + n] == slot[m] && position[m + n] == position[m] + n) n++;
    const long then = item + n, r = row_$key(then % M, M), begin = start_$key(position[r]);
    const long next = then < last ? (slot[r] * $kv_heads + then / M) * S + $begin : -1;
    together_$key(queries + (j * M + m) * $group * $h, keys, values, S, (slot[m] * $kv_heads + j) * S, next,
                  position[m], n, y + (m * $kv_heads + j) * $group * $h);
    item = then;
  }
}
""")
