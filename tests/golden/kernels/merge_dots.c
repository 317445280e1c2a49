struct arguments {
  const void *team;
  long members;
  const stored_bfloat16 *x0;
  const stored_float32 *x1;
  long piece;
  long N;
  double *dots;
  int64_t *bad;
};

enum { WIDE = LANES / 2, SUMS = 32 / WIDE, STEPS = 32 / LANES };
typedef float  narrow __attribute__((vector_size(4 * WIDE)));
typedef double wide   __attribute__((vector_size(8 * WIDE)));

/* STEPS vectors of float32 as SUMS of float64 */
INLINE void widen_all(const part *v, wide *to) {
  narrow half[SUMS];
  memcpy(half, v, sizeof half);
  UNROLL for (int i = 0; i < SUMS; i++) to[i] = __builtin_convertvector(half[i], wide);
}
INLINE double total(const wide *sums) {
  double lanes[32];
  memcpy(lanes, sums, sizeof lanes);
  double sum = lanes[0];
  for (int i = 1; i < 32; i++) sum += lanes[i];
  return sum;
}

INLINE void step(const stored_bfloat16 *x0, const stored_float32 *x1, wide *aa, wide *ab, wide *bb,
                 part_of_u32 *bad) {
  part a[STEPS], b[STEPS];
  wide c[SUMS], d[SUMS];
  UNROLL for (int i = 0; i < STEPS; i++) {
    a[i] = part_bfloat16(x0 + LANES * i);
    b[i] = part_float32(x1 + LANES * i);
    bad[0] |= wild(a[i]);
    bad[1] |= wild(b[i]);
  }
  widen_all(a, c);
  widen_all(b, d);
  UNROLL for (int i = 0; i < SUMS; i++) {
    aa[i] = aa[i] + c[i] * c[i];
    ab[i] = ab[i] + c[i] * d[i];
    bb[i] = bb[i] + d[i] * d[i];
  }
}

void dots(const struct arguments *a) {
  const long N = a->N;
  part_of_u32 bad[2] = {{0}};
  double *to = a->dots;
  for (long from = 0; from < N; from += a->piece) {
    const long upto = from + a->piece < N ? from + a->piece : N;
    wide aa[SUMS] = {{0}}, ab[SUMS] = {{0}}, bb[SUMS] = {{0}};
    long i = from;
    for (; i + 32 <= upto; i += 32) step(a->x0 + i, a->x1 + i, aa, ab, bb, bad);
    if (i < upto) {
      stored_bfloat16 last_x0[32] = {0};
      stored_float32 last_x1[32] = {0};
      memcpy(last_x0, a->x0 + i, sizeof *last_x0 * (size_t)(upto - i));
      memcpy(last_x1, a->x1 + i, sizeof *last_x1 * (size_t)(upto - i));
      step(last_x0, last_x1, aa, ab, bb, bad);
    }
    *to++ = total(aa);
    *to++ = total(ab);
    *to++ = total(bb);
  }
  *a->bad = any(bad[0]) ? 0 : any(bad[1]) ? 1 : -1;
}
