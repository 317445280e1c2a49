"""The C text that writes the cache: norm, turn and scale heads, then store keys by 16 and values by row."""

from __future__ import annotations

from string import Template

WRITE = Template(r"""
INLINE uint16_t nearest_bf16_$key(float a) {
  uint32_t bits; memcpy(&bits, &a, 4);
  if (a != a) return (uint16_t)(bits >> 16 | 0x40);   /* rounding could carry a NaN into infinity */
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* y = one head of q or k: normed where asked, its first dimensions turned, times scale */
INLINE void head_$key(const float *RESTRICT x, const float *RESTRICT gain, const float *RESTRICT c,
                      const float *RESTRICT s, const float scale, float *RESTRICT y) {
  if ($norm) {
    f32x16 squares = {0};
    for (long d = 0; d < $h; d += 16) { f32x16 a = take(x + d, $h - d); squares += a * a; }
    const float inverse = 1.0f / sqrtf(sum_of(squares) * (1.0f / $h) + $eps);
    for (long d = 0; d < $h; d++) y[d] = x[d] * inverse * (gain[d] + $offset);
  } else {
    for (long d = 0; d < $h; d++) y[d] = x[d];
  }
  for (long i = 0; i < $half; i++) {
    const float a = y[i], b = y[i + $half];
    y[i] = a * c[i] - b * s[i];
    y[i + $half] = b * c[i] + a * s[i];
  }
  if (scale != 1) for (long d = 0; d < $h; d++) y[d] *= scale;
}

/* items in order of 16 rows, kv head, row: the keys of 16 rows share cache lines.
   Rows q [M, H h], k and v [M, Hk h] at their strides; slot, position and the row of the tables, turn [M];
   cosines and sines [*, r / 2], gains [h], none of which is read when the spec does not ask for it
   -> keys [slots, Hk, S / 16, h, 16], values [slots, Hk, S, h'], queries [Hk, M, G, h] */
static void write_cache_$key(
    const float *RESTRICT q, const float *RESTRICT k, const float *RESTRICT v,
    long q_stride, long k_stride, long v_stride,
    const int64_t *RESTRICT slot, const int64_t *RESTRICT position, const int64_t *RESTRICT turn,
    const float *RESTRICT cosines, const float *RESTRICT sines,
    const float *RESTRICT q_gain, const float *RESTRICT k_gain,
    $cell *RESTRICT keys, $cell *RESTRICT values, float *RESTRICT queries,
    long M, long S, long first, long last) {
  for (long item = first; item < last; item++) {
    const long unit = item / (16 * $kv_heads) * 16, size = M - unit < 16 ? M - unit : 16;
    const long j = (item - unit * $kv_heads) / size, m = unit + (item - unit * $kv_heads) % size;
    const long head = slot[m] * $kv_heads + j, at = $at;
    const float *c = $half ? cosines + turn[m] * $half : 0, *s = $half ? sines + turn[m] * $half : 0;
    for (long g = 0; g < $group; g++)
      head_$key(q + m * q_stride + (j * $group + g) * $h, q_gain, c, s, $scale,
                queries + ((j * M + m) * $group + g) * $h);
    float turned[$h];
    head_$key(k + m * k_stride + j * $h, k_gain, c, s, 1, turned);
    $cell *to = keys + (head * S + at / 16 * 16) * $h + at % 16;
    for (long d = 0; d < $h; d++) to[16 * d] = $as_cell(turned[d]);
    const float *from = v + m * v_stride + j * $h;
    to = values + (head * S + at) * $padded;
    for (long d = 0; d < $h; d++) to[d] = $as_cell(from[d]);
    for (long d = $h; d < $padded; d++) to[d] = 0;
  }
}
""")
