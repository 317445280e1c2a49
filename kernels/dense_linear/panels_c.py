"""dense_linear for many rows: panels of 64 channels laid out along k once, then used by all rows.

A sum has the bits of the other way. There lane p of a vector adds up the columns p, p + 16, p + 32, ...; here
these columns are a phase, one after the other for 64 channels side by side, and the sums of the 16 phases are
added up in the order of the lanes. So no vector must be summed across, which for few columns takes as long
as the products, and tiles of rows share what they load. Columns go in chunks, so that x stays near.
"""

from __future__ import annotations

from collections.abc import Sequence

from effc.kernels.dense_linear.spec import BLOCK, DenseLinearSpec

CHUNK = 1024
"""Columns of a chunk; sums go on from chunk to chunk, so it changes no bit."""
ROWS = 96
"""Rows whose sums wait between two chunks: they stay in a second cache."""

_COMMON = r"""
#ifndef PANELS_$kind
#define PANELS_$kind
#ifndef PANELS
#define PANELS
#include <stdlib.h>
enum { WIDE = 64, CHUNK = $chunk, WAITING = $rows };
#if defined(__AVX512F__)
enum { TILE_ROWS = 6, TILE_PARTS = 4 };
#elif defined(__AVX2__)
enum { TILE_ROWS = 6, TILE_PARTS = 2 };
#else
enum { TILE_ROWS = 2, TILE_PARTS = 2 };
#endif
/* rows 0 to 15 of a matrix become its columns */
INLINE void turned(f32x16 *RESTRICT v) {
#if defined(__AVX512F__)
  __m512 a[16], b[16];
  UNROLL for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps((__m512)v[i], (__m512)v[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps((__m512)v[i], (__m512)v[i + 1]);
  }
  UNROLL for (int i = 0; i < 16; i += 4)
    UNROLL for (int j = 0; j < 2; j++) {
      b[i + 2 * j] = (__m512)_mm512_unpacklo_pd((__m512d)a[i + j], (__m512d)a[i + j + 2]);
      b[i + 2 * j + 1] = (__m512)_mm512_unpackhi_pd((__m512d)a[i + j], (__m512d)a[i + j + 2]);
    }
  UNROLL for (int j = 0; j < 4; j++) {
    const __m512 even = _mm512_shuffle_f32x4(b[j], b[4 + j], 0x88);
    const __m512 odd = _mm512_shuffle_f32x4(b[j], b[4 + j], 0xdd);
    const __m512 next = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0x88);
    const __m512 last = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0xdd);
    v[j] = (f32x16)_mm512_shuffle_f32x4(even, next, 0x88);
    v[8 + j] = (f32x16)_mm512_shuffle_f32x4(even, next, 0xdd);
    v[4 + j] = (f32x16)_mm512_shuffle_f32x4(odd, last, 0x88);
    v[12 + j] = (f32x16)_mm512_shuffle_f32x4(odd, last, 0xdd);
  }
#else
  float from[16][16], to[16][16];
  memcpy(from, v, sizeof from);
  for (int i = 0; i < 16; i++) for (int j = 0; j < 16; j++) to[j][i] = from[i][j];
  memcpy(v, to, sizeof to);
#endif
}
/* one phase of a chunk: sums [6, 64] += x [6, n columns 16 apart] times w [n, 64], n > 0; of the first
   chunk sums begin here */
INLINE void phase(const int R, const int first, const float *RESTRICT x, const float *RESTRICT w, long n,
                  long K, float *RESTRICT sums) {
  for (int from = 0; from < WIDE; from += TILE_PARTS * LANES) {
    part acc[TILE_ROWS][TILE_PARTS];
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int c = 0; c < TILE_PARTS; c++)
        acc[r][c] = first ? (part){0} : part_float32(sums + r * WIDE + from + c * LANES);
    long i = 0;
    do {
      part b[TILE_PARTS];
      UNROLL for (int c = 0; c < TILE_PARTS; c++) {
        b[c] = part_float32(w + i * WIDE + from + c * LANES);
        LOADED(b[c]);
      }
      UNROLL for (int r = 0; r < R; r++) {
        part a = part_all(x[r * K + 16 * i]);
        LOADED(a);
        UNROLL for (int c = 0; c < TILE_PARTS; c++) acc[r][c] += a * b[c];
      }
    } while (++i < n);
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int c = 0; c < TILE_PARTS; c++)
        memcpy(sums + r * WIDE + from + c * LANES, &acc[r][c], sizeof(part));
  }
}
/* sums of 16 phases [16, 6, 64] -> results [6, 64], in the order in which `sums_of` adds lanes */
INLINE void phases_added(const float *RESTRICT s, const int R, float *RESTRICT out) {
  const long by = TILE_ROWS * WIDE;
  for (int at = 0; at < R * WIDE; at += LANES) {
    part v[8];
    UNROLL for (int i = 0; i < 8; i++)
      v[i] = part_float32(s + i * by + at) + part_float32(s + (i + 8) * by + at);
    UNROLL for (int i = 0; i < 8; i += 2) v[i] += v[i + 1];
    v[0] += v[2];
    v[4] += v[6];
    v[0] += v[4];
    memcpy(out + at, v, sizeof(part));
  }
}
/* the chunk of columns at `from` times one panel, into the sums of R rows */
INLINE void chunk_of(const int R, const float *RESTRICT x, const float *RESTRICT panel, long from, long K,
                     float *RESTRICT s) {
  const long end = from + CHUNK < K ? from + CHUNK : K, each = (end - from + 15) / 16;
  for (int p = 0; p < 16; p++, s += TILE_ROWS * WIDE) {
    const float *w = panel + (from + p * each) * WIDE;
    const long n = (end - from - p + 15) / 16;
    if (from + p >= end) { if (from == 0) memset(s, 0, sizeof(float) * R * WIDE); }
    else if (from == 0) phase(R, 1, x + p, w, n, K, s);
    else phase(R, 0, x + from + p, w, n, K, s);
  }
}
static __attribute__((noinline)) void rows_of(long rows, const float *RESTRICT x, const float *RESTRICT panel,
                                              long from, long K, float *RESTRICT s) {
  if (rows == TILE_ROWS) { chunk_of(TILE_ROWS, x, panel, from, K, s); return; }
  for (long r = 0; r < rows; r++) chunk_of(1, x + r * K, panel, from, K, s + r * WIDE);
}
#endif
/* channels n to n + 63 of w, past its last that one again; each chunk [16 phases, columns / 16, 64] */
static void panel_$kind(const stored_$kind *RESTRICT w, long n, long N, long K, float *RESTRICT out) {
  for (long from = 0; from < K; from += CHUNK) {
    const long end = from + CHUNK < K ? from + CHUNK : K, each = (end - from + 15) / 16;
    float *to = out + from * WIDE;
    for (long k = from; k < end; k += 16)
      for (int c = 0; c < WIDE; c += 16) {
        f32x16 v[16];
        for (int i = 0; i < 16; i++)
          v[i] = take_$kind(w + (n + c + i < N ? n + c + i : N - 1) * K + k, end - k);
        turned(v);
        for (int p = 0; p < 16; p++) store(to + (p * each + (k - from) / 16) * WIDE + c, v[p]);
      }
  }
}
#endif
"""

_FUNCTION = r"""
/* blocks first to last for M rows; 0 when there is no memory for panels */
static int panels_$key(const float *RESTRICT x, const stored_$kind *RESTRICT w,
    const stored_$kind *RESTRICT w2, float *RESTRICT y$takes, long M, long N, long K, long first, long last) {
  const long columns = (K + 15) / 16 * 16, sums = 16 * TILE_ROWS * WIDE;
  const long tiles = K > CHUNK ? WAITING / TILE_ROWS : 1;
  float *const memory = malloc(sizeof(float) * $matrices * (WIDE * columns + tiles * sums) + 64);
  if (!memory) return 0;
  float *const panel = (float *)(((uintptr_t)memory + 63) / 64 * 64);
  float *const s = panel + $matrices * WIDE * columns;
  for (long block = first; block < last; block += WIDE / $block) {
    const long n0 = block * $block, rest = (last - block) * $block, wide = rest < WIDE ? rest : WIDE;
    panel_$kind(w, n0, N, K, panel);$second_panel
    for (long some = 0; some < M; some += tiles * TILE_ROWS)
      for (long from = 0; from < K; from += CHUNK)
        for (long t = 0; t < tiles && some + t * TILE_ROWS < M; t++) {
          const long m0 = some + t * TILE_ROWS, rows = M - m0 < TILE_ROWS ? M - m0 : TILE_ROWS;
          rows_of(rows, x + m0 * K, panel, from, K, s + t * sums);$second_rows
          if (from + CHUNK < K) continue;
          float one[TILE_ROWS * WIDE]$two;
          phases_added(s + t * sums, rows, one);$second_added
          for (long r = 0; r < rows; r++)
            for (long c = 0; c < wide && n0 + c < N; c += 16) {
              const long m = m0 + r, n = n0 + c, count = N - n;
              f32x16 a = load(one + r * WIDE + c);
$steps
              give(y + m * N + n, a, count);
            }
        }
  }
  free(memory);
  return 1;
}
"""


def function(spec: DenseLinearSpec, takes: str, steps: Sequence[str]) -> str:
    """`panels_<key>`, called as `dense_linear_<key>` is; `steps` are the epilogue's."""
    lines = list(steps)
    text = _COMMON.replace("$chunk", str(CHUNK)).replace("$rows", str(ROWS)) + _FUNCTION
    second = {"panel": "", "rows": "", "added": ""}
    if spec.paired:
        lines.insert(1, "a = a * load(two + r * WIDE + c);")
        second = {
            "panel": "\n    panel_$kind(w2, n0, N, K, panel + WIDE * columns);",
            "rows": "\n          rows_of(rows, x + m0 * K, panel + WIDE * columns, from, K,"
            "\n                  s + (tiles + t) * sums);",
            "added": "\n          phases_added(s + (tiles + t) * sums, rows, two);",
        }
    for name, words in second.items():
        text = text.replace(f"$second_{name}", words)
    given = {
        "key": spec.key,
        "takes": takes,
        "matrices": str(1 + spec.paired),
        "block": str(BLOCK),
        "two": ", two[TILE_ROWS * WIDE]" if spec.paired else "",
        "steps": "\n".join(f"              {line}" for line in lines),
        "kind": spec.weight,
    }
    for name, words in given.items():
        text = text.replace(f"${name}", words)
    return text
