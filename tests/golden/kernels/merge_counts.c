struct arguments {
  const void *team;
  long members;
  const stored_bfloat16 *x0;
  const stored_bfloat16 *x1;
  const stored_bfloat16 *base;
  long N;
  const uint32_t *bins;
  uint32_t *rows;
  int64_t *found;
  int64_t *bad;
};
INLINE void taken(part_of_u32 bits, int count, uint32_t bin, uint32_t *row, int64_t *found) {
  bits = bits - bin;                                  /* below 2^16 for those in the bin */
  if (!any((part_of_u32)(bits < 65536u))) return;
  for (int i = 0; i < count; i++) if (bits[i] < 65536u) row[(*found)++] = bits[i];
}

INLINE void step(const stored_bfloat16 *x0, const stored_bfloat16 *x1, const stored_bfloat16 *base, int count, const struct arguments *a, long N, part_of_u32 *bad) {
  part b = part_bfloat16(base);
  bad[2] |= wild(b);
  part c0 = part_bfloat16(x0);
  bad[0] |= wild(c0);
  taken(lifted(c0 - b), count, a->bins[0], a->rows + N * 0, a->found + 0);
  part c1 = part_bfloat16(x1);
  bad[1] |= wild(c1);
  taken(lifted(c1 - b), count, a->bins[1], a->rows + N * 1, a->found + 1);
}

void counts(const struct arguments *a) {
  const long N = a->N;
  part_of_u32 bad[3] = {{0}};
  for (int k = 0; k < 2; k++) a->found[k] = 0;
  long i = 0;
  for (; i + LANES <= N; i += LANES) step(a->x0 + i, a->x1 + i, a->base + i, LANES, a, N, bad);
  if (i < N) {
    stored_bfloat16 last_x0[LANES] = {0};
    memcpy(last_x0, a->x0 + i, sizeof *last_x0 * (size_t)(N - i));
    stored_bfloat16 last_x1[LANES] = {0};
    memcpy(last_x1, a->x1 + i, sizeof *last_x1 * (size_t)(N - i));
    stored_bfloat16 last_base[LANES] = {0};
    memcpy(last_base, a->base + i, sizeof *last_base * (size_t)(N - i));
    step(last_x0, last_x1, last_base, (int)(N - i), a, N, bad);
  }
  *a->bad = -1;
  for (int k = 2; k >= 0; k--) if (any(bad[k])) *a->bad = k;
}
