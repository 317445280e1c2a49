struct arguments {
  const void *team;
  long members;
  const stored_bfloat16 *x0;
  const stored_bfloat16 *x1;
  stored_bfloat16 *out;
  const float *shares;
  const float *above;
  const float *scale;
  const uint64_t *keys;
  long below;
  long start;
  long N;
  int64_t *bad;
};

#define TINY 1.17549435e-38f
INLINE part one_where(part_of_u32 lanes) { return (part)(lanes & 0x3f800000u); }
INLINE part_of_u32 widened(const uint16_t *p) {
  part_of_u16 v;
  memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, part_of_u32);
}
INLINE part sign_of(part v) {   /* of what is no number, that */
  const part_of_u32 none = (part_of_u32)(v != v);
  const part sign = one_where((part_of_u32)(v > 0.0f)) - one_where((part_of_u32)(v < 0.0f));
  return (part)(((part_of_u32)sign & ~none) | ((part_of_u32)v & none));
}
INLINE void step(const stored_bfloat16 *x0, const stored_bfloat16 *x1, stored_bfloat16 *out, const float *shares, const float *above, float scale, uint32_t below, part_of_u32 *bad) {
  part c0 = part_bfloat16(x0);
  bad[0] |= wild(c0);
  part c1 = part_bfloat16(x1);
  bad[1] |= wild(c1);
  c0 = c0 * shares[0];
  c1 = c1 * shares[1];
  part total = c0;
  total = total + c1;
  put_bfloat16(out, total);
}

void mix(const struct arguments *a) {
  const long N = a->N;
  part_of_u32 bad[2] = {{0}};
  for (long from = 0; from < N; from += N) {
    const long upto = N;
    long i = from;
    for (; i + LANES <= upto; i += LANES) step(a->x0 + i, a->x1 + i, a->out + i, a->shares, a->above, *a->scale, (uint32_t)a->below, bad);
    if (i == upto) continue;
    stored_bfloat16 last_out[LANES];
    stored_bfloat16 last_x0[LANES] = {0};
    memcpy(last_x0, a->x0 + i, sizeof *last_x0 * (size_t)(N - i));
    stored_bfloat16 last_x1[LANES] = {0};
    memcpy(last_x1, a->x1 + i, sizeof *last_x1 * (size_t)(N - i));
    step(last_x0, last_x1, last_out, a->shares, a->above, *a->scale, (uint32_t)a->below, bad);
    memcpy(a->out + i, last_out, sizeof *last_out * (size_t)(N - i));
  }
  *a->bad = -1;
  for (int k = 1; k >= 0; k--) if (any(bad[k])) *a->bad = k;
}
