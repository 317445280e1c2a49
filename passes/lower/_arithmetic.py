"""Elementwise jobs that no matrix takes into its epilogue, as one C statement over items i0 to i1."""

from __future__ import annotations

from collections.abc import Sequence

from effc.kernels.epilogue import EPILOGUES

_EXPRESSIONS = {
    "add": "a + take(y + i, count)",
    "gate": "a * take(y + i, count)",
    "scale": "a * {number}f",
    "softcap": "{number}f * hyperbolic_tangent(a / {number}f)",
}


def statement(name: str, number: float, reads: Sequence[str], out: str) -> str:
    """`name`: add, gate, scale, softcap or an activation; `reads`: 1 or 2 buffers; `out` may be the first."""
    result = _EXPRESSIONS[name].format(number=repr(number)) if name in _EXPRESSIONS else EPILOGUES[name].c
    second = f"const float *y = {{{reads[1]}}}; " if len(reads) > 1 else ""
    return (
        f"const float *x = {{{reads[0]}}}; {second}float *z = {{{out}}};\n"
        "    for (long i = i0; i < i1; i += 16) {\n"
        "      const long count = i1 - i;\n"
        "      f32x16 a = take(x + i, count);\n"
        f"      give(z + i, {result}, count);\n"
        "    }"
    )
