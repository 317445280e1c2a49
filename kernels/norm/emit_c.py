"""norm in C: one row at a time, sums in four vectors that are added in one order, whoever does the row."""

from __future__ import annotations

from functools import cache

from effc.kernels.cpu.entry import self_contained
from effc.kernels.norm.spec import NormSpec


def function(spec: NormSpec) -> str:
    """`norm_row_<key>` on one row, inline, and `norm_<key>` on rows first to last. y may be x."""
    layer = spec.form == "layer"
    gain = f"(take(gain + k, count) + {_number(spec.offset)})" if spec.offset else "take(gain + k, count)"
    bias = " + take(bias + k, count)" if spec.bias else ""
    mean = f"""
  const float mean = total_{spec.key}(x, D, 0, 0.0f) / (float)D;""" if layer else """
  const float mean = 0.0f;"""  # fmt: skip
    return f"""
/* sum over a row of x, or of (x - mean)^2 */
INLINE float total_{spec.key}(const float *x, long D, const int squares, float mean) {{
  f32x16 s[4] = {{{{0}}}};
  long k = 0;
  for (; k + 64 <= D; k += 64)
    for (int i = 0; i < 4; i++) {{
      f32x16 a = load(x + k + 16 * i){" - mean" if layer else ""};
      s[i] += squares ? a * a : a;
    }}
  for (; k + 16 <= D; k += 16) {{
    f32x16 a = load(x + k){" - mean" if layer else ""};
    s[0] += squares ? a * a : a;
  }}
  float rest = 0.0f;
  for (; k < D; k++) {{
    float a = x[k]{" - mean" if layer else ""};
    rest += squares ? a * a : a;
  }}
  return sum_of((s[0] + s[1]) + (s[2] + s[3])) + rest;
}}

/* one row x [D] -> y [D]; y may be x */
INLINE void norm_row_{spec.key}(const float *x, const float *RESTRICT gain, const float *RESTRICT bias,
                                float *y, long D) {{{mean}
  const float inverse = 1.0f / sqrtf(total_{spec.key}(x, D, 1, mean) / (float)D + {_number(spec.eps)});
  for (long k = 0; k < D; k += 16) {{
    const long count = D - k;
    give(y + k, (take(x + k, count){" - mean" if layer else ""}) * inverse * {gain}{bias}, count);
  }}
}}

/* rows first to last of x [M, D] */
static void norm_{spec.key}(const float *x, const float *RESTRICT gain, const float *RESTRICT bias,
                            float *y, long D, long first, long last) {{
  for (long m = first; m < last; m++) norm_row_{spec.key}(x + m * D, gain, bias, y + m * D, D);
}}
"""


FIELDS = {
    "x": "const float *",
    "gain": "const float *",
    "bias": "const float *",
    "y": "float *",
    "M": "long",
    "D": "long",
}


@cache
def emit(spec: NormSpec) -> str:
    """The self-contained file."""
    work = (
        f"  norm_{spec.key}(a->x, a->gain, a->bias, a->y, a->D, "
        "a->M * member / members, a->M * (member + 1) / members);"
    )
    return self_contained(spec, function(spec), FIELDS, work)


def _number(value: float) -> str:
    return f"{value!r}f" if "." in repr(value) or "e" in repr(value) else f"{value!r}.0f"
