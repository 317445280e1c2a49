"""dots in C: a.a, a.b and b.b of two models as stored, piece by piece, in float64.

A product of two float32 is exact in float64, and the order of the sums is fixed (`reference.dotted`), so
every set of instructions gives the same bits. Reads 4 bytes a number of bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, ClassVar

import torch

from effc.kernels.cpu.case import Argument, Case
from effc.kernels.cpu.stored import DTYPES, Stored
from effc.kernels.kernel import KernelSpec
from effc.kernels.merge.reference import DOT_LANES, dotted
from effc.kernels.merge.text import whole_file


class DotsSpec(KernelSpec, frozen=True):
    """[a.a, a.b, b.b] of every piece of a [N] and b [N]."""

    op: ClassVar[str] = "dots"
    version: ClassVar[int] = 1

    models: tuple[Stored, Stored]

    @property
    def inputs(self) -> dict[str, Stored]:
        return {f"x{k}": stored for k, stored in enumerate(self.models)}


def fields(spec: DotsSpec) -> dict[str, str]:
    """x0, x1 [N] as stored; `piece`: numbers of a piece; dots [ceil(N / piece), 3] float64; bad as in mix."""
    inputs = {name: f"const stored_{kind} *" for name, kind in spec.inputs.items()}
    return inputs | {"piece": "long", "N": "long", "dots": "double *", "bad": "int64_t *"}


_WIDE = rf"""
enum {{ WIDE = LANES / 2, SUMS = {DOT_LANES} / WIDE, STEPS = {DOT_LANES} / LANES }};
typedef float  narrow __attribute__((vector_size(4 * WIDE)));
typedef double wide   __attribute__((vector_size(8 * WIDE)));

/* STEPS vectors of float32 as SUMS of float64 */
INLINE void widen_all(const part *v, wide *to) {{
  narrow half[SUMS];
  memcpy(half, v, sizeof half);
  UNROLL for (int i = 0; i < SUMS; i++) to[i] = __builtin_convertvector(half[i], wide);
}}
INLINE double total(const wide *sums) {{
  double lanes[{DOT_LANES}];
  memcpy(lanes, sums, sizeof lanes);
  double sum = lanes[0];
  for (int i = 1; i < {DOT_LANES}; i++) sum += lanes[i];
  return sum;
}}
"""


@cache
def emit(spec: DotsSpec) -> str:
    """The self-contained file."""
    first, second = spec.models
    step = f"""
INLINE void step(const stored_{first} *x0, const stored_{second} *x1, wide *aa, wide *ab, wide *bb,
                 part_of_u32 *bad) {{
  part a[STEPS], b[STEPS];
  wide c[SUMS], d[SUMS];
  UNROLL for (int i = 0; i < STEPS; i++) {{
    a[i] = part_{first}(x0 + LANES * i);
    b[i] = part_{second}(x1 + LANES * i);
    bad[0] |= wild(a[i]);
    bad[1] |= wild(b[i]);
  }}
  widen_all(a, c);
  widen_all(b, d);
  UNROLL for (int i = 0; i < SUMS; i++) {{
    aa[i] = aa[i] + c[i] * c[i];
    ab[i] = ab[i] + c[i] * d[i];
    bb[i] = bb[i] + d[i] * d[i];
  }}
}}
"""
    work = f"""  const long N = a->N;
  part_of_u32 bad[2] = {{{{0}}}};
  double *to = a->dots;
  for (long from = 0; from < N; from += a->piece) {{
    const long upto = from + a->piece < N ? from + a->piece : N;
    wide aa[SUMS] = {{{{0}}}}, ab[SUMS] = {{{{0}}}}, bb[SUMS] = {{{{0}}}};
    long i = from;
    for (; i + {DOT_LANES} <= upto; i += {DOT_LANES}) step(a->x0 + i, a->x1 + i, aa, ab, bb, bad);
    if (i < upto) {{
      stored_{first} last_x0[{DOT_LANES}] = {{0}};
      stored_{second} last_x1[{DOT_LANES}] = {{0}};
      memcpy(last_x0, a->x0 + i, sizeof *last_x0 * (size_t)(upto - i));
      memcpy(last_x1, a->x1 + i, sizeof *last_x1 * (size_t)(upto - i));
      step(last_x0, last_x1, aa, ab, bb, bad);
    }}
    *to++ = total(aa);
    *to++ = total(ab);
    *to++ = total(bb);
  }}
  *a->bad = any(bad[0]) ? 0 : any(bad[1]) ? 1 : -1;"""
    return whole_file(spec, _WIDE + step, fields(spec), work)


def parse(data: Mapping[str, Any]) -> DotsSpec:
    return DotsSpec.model_validate(data)


def cases(spec: DotsSpec) -> Iterator[Case]:
    """Pieces that end within a vector, one that is shorter than any, and numbers of very unequal size."""
    for size, piece in ((7, 16), (96, 37), (1000, 256)):
        dice = torch.Generator().manual_seed(size)
        a, b = (torch.randn(size, generator=dice) * 10 ** torch.randn(size, generator=dice) for _ in range(2))
        stored = {n: t.to(DTYPES[s]) for (n, s), t in zip(spec.inputs.items(), (a, b), strict=True)}
        x, y = (t.float().numpy() for t in stored.values())
        cuts = [slice(at, at + piece) for at in range(0, size, piece)]
        pairs = ((x, x), (x, y), (y, y))
        due = torch.tensor([[dotted(p[c], q[c]) for p, q in pairs] for c in cuts], dtype=torch.float64)
        found = torch.empty(len(cuts), 3, dtype=torch.float64)
        bad = torch.empty(1, dtype=torch.int64)
        given: dict[str, Argument] = {**stored, "piece": piece, "N": size, "dots": found, "bad": bad}
        yield Case(f"{size} in pieces of {piece}", given, {"dots": due, "bad": torch.tensor([-1])}, 0)
