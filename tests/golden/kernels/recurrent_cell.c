
static void recurrent_cell_55f989804d6a2a88(const float *RESTRICT u0, const float *RESTRICT u1,
    const float *RESTRICT u2, const float *RESTRICT a, const int64_t *RESTRICT slot,
    const int64_t *RESTRICT position, float *RESTRICT states, float *RESTRICT y, long M,
    long first, long last) {
  for (long n = first * 16; n < last * 16; n += 16) {
    const long count = 128 - n;
    const f32x16 a0 = take(a + 0 + n, count);
    const f32x16 a1 = take(a + 128 + n, count);
    const f32x16 a2 = take(a + 256 + n, count);
    for (long m = 0; m < M; m++) {
      const long at = m * 128 + n;
      f32x16 h = take(states + slot[m] * 128 + n, count);
      if (position[m] == 0) h = all(0.0f);
      const f32x16 z = sigmoid(a0 * h + take(u0 + at, count));
      const f32x16 r = sigmoid(a1 * h + take(u1 + at, count));
      const f32x16 c = hyperbolic_tangent(a2 * r * h + take(u2 + at, count));
      h = (1.0f - z) * h + z * c;
      give(states + slot[m] * 128 + n, h, count);
      give(y + at, h, count);
    }
  }
}
