"""C text that reads numbers as a checkpoint stores them (float32, bfloat16, float16) into vectors of float32.

`function(spec)` of several ops begins with it, so it guards itself against being pasted twice.
"""

from __future__ import annotations

from typing import Literal

import torch

Stored = Literal["float32", "bfloat16", "float16"]
"""How a table or a matrix is stored; also the name by which the C text reads it: take_float32 and so on."""

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

STORED = r"""
#ifndef STORED
#define STORED
typedef float stored_float32;
typedef uint16_t stored_bfloat16, stored_float16;
INLINE f32x16 load_float32(const float *p) { return load(p); }
INLINE f32x16 load_bfloat16(const uint16_t *p) { return load_bf16(p); }
INLINE f32x16 load_float16(const uint16_t *p) { return load_f16(p); }
INLINE f32x16 take_float32(const float *p, long count) { return take(p, count); }
INLINE f32x16 take_bfloat16(const uint16_t *p, long count) {
  uint16_t v[16] = {0};
  if (__builtin_expect(count >= 16, 1)) return load_bf16(p);
  memcpy(v, p, sizeof(uint16_t) * count);
  return load_bf16(v);
}
INLINE f32x16 take_float16(const uint16_t *p, long count) {
  uint16_t v[16] = {0};
  if (__builtin_expect(count >= 16, 1)) return load_f16(p);
  memcpy(v, p, sizeof(uint16_t) * count);
  return load_f16(v);
}
#endif
"""
