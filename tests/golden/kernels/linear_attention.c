
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

#ifndef GATES
#define GATES
/* log(1 + e) for e in 0..1: 2 artanh(e / (2 + e)) */
INLINE f32x16 log_of_one_and(f32x16 e) {
  const f32x16 z = e / (2.0f + e), s = z * z;
  f32x16 p = s * 0.153846154f + 0.181818182f;
  p = p * s + 0.222222222f;
  p = p * s + 0.285714286f;
  p = p * s + 0.4f;
  p = p * s + 0.666666667f;
  return p * s * z + 2.0f * z;
}
/* log sigmoid(x) */
INLINE f32x16 log_gate(f32x16 x) {
  return choose(x < 0.0f, x, all(0.0f)) - log_of_one_and(exponential(-magnitude(x)));
}
/* 1 - e^g for g <= 0, exact to the last digits where g is near 0 */
INLINE f32x16 entry(f32x16 g) {
  f32x16 p = all(1.9875691500e-4f);
  p = p * g + 1.3981999507e-3f;
  p = p * g + 8.3334519073e-3f;
  p = p * g + 4.1665795894e-2f;
  p = p * g + 1.6666665459e-1f;
  p = p * g + 5.0000001201e-1f;
  return choose(g > -0.34f, -(p * g * g + g), 1.0f - exponential(g));
}
/* y [size] = softmax(y) times scale */
static void soften(float *y, long size, float scale) {
  f32x16 most = all(-INFINITY), sum = {0};
  for (long d = 0; d < size; d += 16)
    for (long i = d; i < size && i < d + 16; i++)
      most[i - d] = y[i] > most[i - d] || y[i] != y[i] ? y[i] : most[i - d];
  const float top = largest_of(most);
  for (long d = 0; d < size; d += 16) {
    f32x16 e = exponential(take(y + d, size - d) - top);
    if (size - d < 16) for (long i = size - d; i < 16; i++) e[i] = 0;
    sum += e;
    give(y + d, e, size - d);
  }
  const float by = scale / sum_of(sum);
  for (long d = 0; d < size; d += 16) give(y + d, take(y + d, size - d) * by, size - d);
}
#endif

static void prepare_603f2acaf9e374d2(const float *RESTRICT q, const float *RESTRICT k, const float *RESTRICT x,
    long q_stride, long k_stride, long x_stride, const float *RESTRICT q_gain, const float *RESTRICT k_gain,
    float *RESTRICT queries, float *RESTRICT keys, float *RESTRICT values, float *RESTRICT decay,
    long first, long last) {
  for (long item = first; item < last; item++) {
    const long m = item / 2, j = item % 2;
    const float *from = x + m * x_stride + j * 64;
    float mean[64] = {0}, let_in[64];
    memcpy(mean, from, 256);
    for (long i = 0; i < 64; i += 16) {
      const f32x16 g = log_gate(load(mean + i)) * 0.0625f;
      give(decay + item * 64 + i, exponential(g), 64 - i);
      store(let_in + i, entry(g));
    }
    for (long i = 0; i < 4; i++) {
      float *to = queries + (item * 4 + i) * 64;
      memcpy(to, q + m * q_stride + (j * 4 + i) * 64, 256);
       soften(to, 64, 1.0f);
    }
    { float *to = keys + item * 64;
      memcpy(to, k + m * k_stride + j * 64, 256);
       soften(to, 64, 1.0f); }
    
  }
}

static void recur_603f2acaf9e374d2(const float *RESTRICT queries, const float *RESTRICT keys, const float *RESTRICT v,
    long v_stride, const float *RESTRICT decay, const int64_t *RESTRICT slot,
    const int64_t *RESTRICT position, float *RESTRICT states, float *y, long M, long first, long last) {
  for (long item = first; item < last; item++) {
    const long j = item / 4, b = item % 4, count = 64 - 16 * b;
    for (long m = 0; m < M; m++) {
      float *s = states + ((slot[m] * 2 + j) * 4 + b) * 1024;
      if (position[m] == 0) memset(s, 0, 4096);
      const float *key = keys + (m * 2 + j) * 64;
      const float *q = queries + (m * 2 + j) * 256;
      const f32x16 value = take(v + m * v_stride + j * 64 + 16 * b, count);
      const float *a = decay + (m * 2 + j) * 64;
      f32x16 o[4][2] = {{{0}}};
      for (long d = 0; d < 64; d++) {
        const f32x16 now = load(s + 16 * d) * a[d] + value * key[d];
        store(s + 16 * d, now);
        UNROLL for (long i = 0; i < 4; i++) o[i][d % 2] += now * q[i * 64 + d];
      }
      for (long i = 0; i < 4; i++) {
        const long at = (m * 8 + j * 4 + i) * 64 + 16 * b;
        give(y + at, (o[i][0] + o[i][1]), count);
      }
    }
  }
}
