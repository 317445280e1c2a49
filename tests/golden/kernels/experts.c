
static void route_9924ce9d3d901201(const float *RESTRICT scores, float *RESTRICT weights, int32_t *RESTRICT chosen,
                        long first, long last) {
  for (long m = first; m < last; m++) {
    float p[16], most = -INFINITY, total = 0;
    for (long i = 0; i < 8; i += 16) {
      f32x16 a = take(scores + m * 8 + i, 8 - i);
      store(p + i, (a));
    }
    for (long i = 0; i < 8; i++) if (p[i] > most || p[i] != p[i]) most = p[i];
    for (long i = 8; i < 16; i++) p[i] = -INFINITY;
    for (long i = 0; i < 16; i += 16) store(p + i, exponential(load(p + i) - most));
    for (long i = 0; i < 8; i++) total += p[i];
    for (long i = 0; i < 8; i++) p[i] /= total;
    float *w = weights + m * 2, sum = 0;
    int32_t *number = chosen + m * 2;
    unsigned char taken[8] = {0};
    for (long j = 0; j < 2; j++) {
      int32_t best = -1;
      for (int32_t i = 0; i < 8; i++) if (!taken[i] && (best < 0 || p[i] > p[best])) best = i;
      taken[best] = 1;
      number[j] = best;
      w[j] = p[best];
      sum += p[best];
    }
    for (long j = 0; j < 2; j++) w[j] /= sum;
  }
}

#ifndef STARTS
#define STARTS
/* edges [E + 2]: expert e has the places edges[e] to edges[e + 1]; `size` choices, E for no expert */
static void starts(const int32_t *RESTRICT chosen, long size, long E, long *RESTRICT edges) {
  for (long e = 0; e < E + 2; e++) edges[e] = 0;
  for (long i = 0; i < size; i++) edges[chosen[i] + 1]++;
  for (long e = 0; e < E; e++) edges[e + 1] += edges[e];
}
#endif

static void spread_b463f4a053e20498(const int32_t *RESTRICT chosen, int32_t *RESTRICT place, long M,
    const void *RESTRICT a, void *RESTRICT to_a, long bytes_a,
    const void *RESTRICT b, void *RESTRICT to_b, long bytes_b,
    const void *RESTRICT c, void *RESTRICT to_c, long bytes_c,
    long first, long last) {
  long next[10];
  starts(chosen, M * 2, 8, next);
  for (long i = 0; i < last * 2; i++) {
    const int32_t e = chosen[i];
    const long at = e < 8 ? next[e]++ : -1;
    if (i < first * 2) continue;
    place[i] = (int32_t)at;
    if (at < 0) continue;
    if (bytes_a) memcpy((char *)to_a + at * bytes_a, (const char *)a + i / 2 * bytes_a, bytes_a);
    if (bytes_b) memcpy((char *)to_b + at * bytes_b, (const char *)b + i / 2 * bytes_b, bytes_b);
    if (bytes_c) memcpy((char *)to_c + at * bytes_c, (const char *)c + i / 2 * bytes_c, bytes_c);
  }
}

#ifndef STARTS
#define STARTS
/* edges [E + 2]: expert e has the places edges[e] to edges[e + 1]; `size` choices, E for no expert */
static void starts(const int32_t *RESTRICT chosen, long size, long E, long *RESTRICT edges) {
  for (long e = 0; e < E + 2; e++) edges[e] = 0;
  for (long i = 0; i < size; i++) edges[chosen[i] + 1]++;
  for (long e = 0; e < E; e++) edges[e + 1] += edges[e];
}
#endif

static void expert_linear_4ea385788a04b5b3(const int32_t *RESTRICT chosen, const int8_t *RESTRICT xq,
    const float *RESTRICT xs, const int32_t *RESTRICT xsum, const uint8_t *RESTRICT w, long apart,
    float *RESTRICT y, long M, long N, long K, long first, long last) {
  const long groups = K / 64;
  long edges[10];
  starts(chosen, M * 2, 8, edges);
  for (long e = 0; e < 8; e++) {
    const long at = edges[e], rows = edges[e + 1] - at;
    if (!rows) continue;
    quant_linear_of_one(xq + at * K, xs + at * groups, xsum + at * groups, w + e * apart, y + at * N,
      rows, N, K, first, last);
  }
}

static void combine_a4286dddcf08a6c5(const float *RESTRICT z, const int32_t *RESTRICT place,
    const float *RESTRICT weights, const float *residual, float *y, long D, long first, long last) {
  for (long m = first; m < last; m++)
    for (long d = 0; d < D; d += 16) {
      f32x16 s = {0};
      for (long j = 0; j < 2; j++) {
        const long at = place[m * 2 + j];
        if (at < 0) { s += weights[m * 2 + j] * 0.0f; continue; }
        s += weights[m * 2 + j] * take(z + at * D + d, D - d);
      }
      give(y + m * D + d, take(residual + m * D + d, D - d) + s, D - d);
    }
}
