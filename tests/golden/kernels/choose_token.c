
/* a comes before b: larger, or the first that is not a number, or as large and earlier */
INLINE int before_bc4158d96fbe01dd(float a, long i, float b, long j) {
  if ((a != a) != (b != b)) return a != a;
  return a > b || ((a == b || a != a) && i < j);
}

static void choose_parts_bc4158d96fbe01dd(const float *RESTRICT logits, long V, long parts,
    float *RESTRICT best, long *RESTRICT where, long first, long last) {
  const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (long item = first; item < last; item++) {
    const long part = item % parts, from = V * part / parts, to = V * (part + 1) / parts;
    const float *p = logits + item / parts * V;
    f32x16 most = all(-INFINITY);
    i32x16 at = lanes + (int32_t)from;
    for (long v = from; v < to; v += 16) {
      f32x16 a = take(p + v, to - v);
      if (to - v < 16) a = choose(lanes < (int32_t)(to - v), a, all(-INFINITY));
      i32x16 win = (a > most) | ((a != a) & (most == most));
      most = choose(win, a, most);
      at = (win & (lanes + (int32_t)v)) | (~win & at);
    }
    float b = most[0];
    long w = at[0];
    for (int i = 1; i < 16; i++) if (before_bc4158d96fbe01dd(most[i], at[i], b, w)) { b = most[i]; w = at[i]; }
    best[item] = b;
    where[item] = w;
  }
}

static void choose_token_bc4158d96fbe01dd(const float *RESTRICT best, const long *RESTRICT where, long parts,
    long *RESTRICT token, long first, long last) {
  for (long row = first; row < last; row++) {
    float b = best[row * parts];
    long w = where[row * parts];
    for (long i = row * parts + 1; i < (row + 1) * parts; i++)
      if (before_bc4158d96fbe01dd(best[i], where[i], b, w)) { b = best[i]; w = where[i]; }
    token[row] = w;
  }
}
