"""The C text that attends: scores by 16 keys, a running softmax over steps of 64, weighted sums of values."""

from __future__ import annotations

from string import Template

ATTEND = Template(r"""
/* p [P, $step] = q [P, $h] times 16 B keys */
INLINE void score_$key(const int P, const int B, const float *RESTRICT q, const $cell *RESTRICT k,
                       float *RESTRICT p) {
  f32x16 a[P][B];
  for (int i = 0; i < P; i++) for (int b = 0; b < B; b++) a[i][b] = all(0.0f);
  for (long d = 0; d < $h; d++) {
    f32x16 w[B];
    for (int b = 0; b < B; b++) w[b] = $load(k + (b * $h + d) * 16);
    for (int i = 0; i < P; i++) for (int b = 0; b < B; b++) a[i][b] += w[b] * q[i * $h + d];
  }
  for (int i = 0; i < P; i++) for (int b = 0; b < B; b++) store(p + i * $step + 16 * b, a[i][b]);
}

/* y [P, 16 V of $padded] += p [P, $step] times `count` values */
INLINE void weigh_$key(const int P, const int V, const float *RESTRICT p, const $cell *RESTRICT v, long count,
                       float *RESTRICT y) {
  f32x16 a[P][V];
  for (int i = 0; i < P; i++) for (int x = 0; x < V; x++) a[i][x] = load(y + i * $padded + 16 * x);
  for (long n = 0; n < count; n++) {
    f32x16 w[V];
    for (int x = 0; x < V; x++) w[x] = $load(v + n * $padded + 16 * x);
    for (int i = 0; i < P; i++) for (int x = 0; x < V; x++) a[i][x] += w[x] * p[i * $step + n];
  }
  for (int i = 0; i < P; i++) for (int x = 0; x < V; x++) store(y + i * $padded + 16 * x, a[i][x]);
}

/* rows 0 to P of q against the keys from..to of one step, in whole vectors */
static void scores_$key(long P, const float *RESTRICT q, const $cell *RESTRICT k, long from, long to,
                        float *RESTRICT p) {
  long i = 0;
  const long low = from / 32 * 32, high = to;
#if defined(__AVX512F__)
  for (; i + 8 <= P; i += 8)
    for (long n = low; n < high; n += 32) score_$key(8, 2, q + i * $h, k + n * $h, p + i * $step + n);
#endif
  for (; i + 4 <= P; i += 4)
    for (long n = low; n < high; n += 32) score_$key(4, 2, q + i * $h, k + n * $h, p + i * $step + n);
  for (; i < P; i++) score_$key(1, 4, q + i * $h, k, p + i * $step);
}

/* rows 0 to P of y take the values from..to of one step */
static void sums_$key(long P, const float *RESTRICT p, const $cell *RESTRICT v, long from, long to,
                      float *RESTRICT y) {
  if (from >= to) return;
  long i = 0;
  p += from;
  v += from * $padded;
#define EACH(P, V) \
  for (; x + V <= $vectors; x += V) \
    weigh_$key(P, V, p + i * $step, v + 16 * x, to - from, y + i * $padded + 16 * x);
#if defined(__AVX512F__)
  for (; i + 8 <= P; i += 8) { long x = 0; EACH(8, 2) EACH(8, 1) }
#endif
  for (; i + 4 <= P; i += 4) { long x = 0; EACH(4, 4) EACH(4, 1) }
  for (; i < P; i++) { long x = 0; EACH(1, 8) EACH(1, 4) EACH(1, 1) }
#undef EACH
}

INLINE int some_$key(i32x16 mask) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#else
  uint64_t w[8]; memcpy(w, &mask, sizeof mask);
  return (w[0] | w[1] | w[2] | w[3] | w[4] | w[5] | w[6] | w[7]) != 0;
#endif
}

/* scores from..to of one step become weights e^(score - most), the others 0; when the largest score rises,
   what was summed before shrinks */
static void soften_$key(float *RESTRICT p, long from, long to, float *RESTRICT most, f32x16 *RESTRICT total,
                        float *RESTRICT y) {
  const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const f32x16 least = all(-INFINITY);
  f32x16 s[$step / 16], top = least;
  for (int b = 0; b < $step / 16; b++) {
    f32x16 a = load(p + 16 * b);
    $cap
    const i32x16 n = lanes + 16 * b;
    if (from > 0 || to < $step) a = choose((n >= (int)from) & (n < (int)to), a, least);
    top = choose((a > top) | (a != a), a, top);
    s[b] = a;
  }
  if (some_$key((top > *most) | (top != top))) {
    const float before = *most, now = largest_of(top);
    const float shrink = exponential(all(before - now))[0];
    *most = now;
    *total *= shrink;
    for (long d = 0; d < $padded; d += 16) store(y + d, load(y + d) * shrink);
  }
  const float base = *most == -INFINITY ? 0 : *most;
  for (int b = 0; b < $step / 16; b++) {
    const f32x16 e = exponential(s[b] - base);
    *total += e;
    store(p + 16 * b, e);
  }
}

/* $group queries of each of n tokens, at `position` and after it, of one sequence; y is the first one's */
static void together_$key(const float *RESTRICT q, const $cell *RESTRICT keys, const $cell *RESTRICT values,
                          long S, long position, long n, float *RESTRICT y) {
  float p[$rows * $step], sum[$rows * $padded], most[$rows];
  f32x16 total[$rows];
  const long P = n * $group, end = position + n;
  const long start = $window && position >= $window ? position - $window + 1 : 0;
  for (long i = 0; i < P; i++) { most[i] = -INFINITY; total[i] = all(0.0f); }
  memset(sum, 0, sizeof(float) * P * $padded);
  for (long base = start / $step * $step; base < end; base += $step) {
    const $cell *k = keys + $chunk * $h, *v = values + $chunk * $padded;
    long from[$tokens], to[$tokens];
    for (long t = 0; t < n; t++) {
      const long lowest = $window ? position + t - $window + 1 - base : 0, above = position + t + 1 - base;
      from[t] = lowest > 0 ? lowest : 0;
      to[t] = above < $step ? above : $step;
    }
    scores_$key(P, q, k, from[0], to[n - 1], p);
    for (long i = 0; i < P; i++)
      if (from[i / $group] < to[i / $group])
        soften_$key(p + i * $step, from[i / $group], to[i / $group], most + i, total + i, sum + i * $padded);
    /* keys that all tokens see are summed together, those before and after for each token */
    const long low = from[n - 1], high = to[0] > low ? to[0] : low;
#define ALONE(first, last) \
  for (long t = 0; t < n; t++) \
    sums_$key($group, p + t * $group * $step, v, first, last, sum + t * $group * $padded);
    ALONE(from[t], to[t] < low ? to[t] : low)
    sums_$key(P, p, v, low, high, sum);
    ALONE(from[t] > high ? from[t] : high, to[t])
#undef ALONE
  }
  for (long i = 0; i < P; i++) {
    const float all_of = sum_of(total[i]);
    float *out = y + (i / $group * $kv_heads * $group + i % $group) * $h;
    for (long d = 0; d < $h; d += 16) give(out + d, load(sum + i * $padded + d) / all_of, $h - d);
  }
}

/* queries, keys and values as write_cache left them -> y [M, H h]; item i is row i % M (in an order that
   gives equal shares of a prefill equal work) of kv head i / M. Tokens that follow each other go together. */
static void attend_$key(
    const float *RESTRICT queries, const $cell *RESTRICT keys, const $cell *RESTRICT values,
    const int64_t *RESTRICT slot, const int64_t *RESTRICT position, float *RESTRICT y,
    long M, long S, long first, long last) {
  const long units = (M + $tokens - 1) / $tokens, tail = M - (units - 1) * $tokens;
  for (long item = first; item < last;) {
    /* units of $tokens rows: the first, the last, the second, the last but one, ... */
    const long j = item / M, i = item % M, even = i < $tokens + tail ? i : i + $tokens - tail;
    const long turn = even / $tokens, unit = turn % 2 ? units - 1 - turn / 2 : turn / 2;
    const long m = unit * $tokens + even % $tokens, next = (unit + 1) * $tokens, over = next < M ? next : M;
    long n = 1;
    while (m + n < over && item + n < last
           && slot[m + n] == slot[m] && position[m + n] == position[m] + n) n++;
    const long head = (slot[m] * $kv_heads + j) * S;
    together_$key(queries + (j * M + m) * $group * $h, keys + head * $h, values + head * $padded, S,
                  position[m], n, y + (m * $kv_heads + j) * $group * $h);
    item += n;
  }
}
""")
