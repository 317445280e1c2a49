
INLINE f32x16 shared_e9671cc551191689(const float *z, long i, long last) {
  if (i / 3 == (i + 15) / 3) return all(z[i / 3]);
  f32x16 v = {0};
  for (long j = i; j < i + 16 && j < last; j++) v[j - i] = z[j / 3];
  return v;
}
static void elementwise_e9671cc551191689(const float *x, const float *z, float *y, long first, long last) {
  for (long i = first; i < last; i += 16) {
    const long count = last - i;
    f32x16 a = take(x + i, count);
    a = a * shared_e9671cc551191689(z, i, last);
    give(y + i, a, count);
  }
}
