"""mix in C: K models and a base as stored in, the merged numbers as stored out, one pass, no copy between.

Each model's number is widened to float32, loses the base, is kept or not, takes its share; the changes add up
or are elected; then the scale, the base, and one rounding. A vector of 16 bfloat16 of two models and a base
takes about 30 instructions, and 2 (K + 2) bytes a number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field

from effc.compiler.shapes import Spot
from effc.kernels.cpu.case import Argument, Case
from effc.kernels.cpu.stored import DTYPES, Stored
from effc.kernels.kernel import KernelSpec
from effc.kernels.merge.asked import Join, Keep, Mix
from effc.kernels.merge.draws import DRAWS, drawn, key_of
from effc.kernels.merge.reference import mixed
from effc.kernels.merge.text import padded, whole_file


class MixSpec(KernelSpec, frozen=True):
    """base + scale join(share keep(x - base)); see `asked.Mix`. Shares, thresholds, scale are arguments."""

    op: ClassVar[str] = "mix"
    version: ClassVar[int] = 1

    models: tuple[Stored, ...] = Field(min_length=1)
    """How each model is stored."""
    base: Stored | None = None
    out: Stored
    join: Join = "sum"
    keep: Keep = "all"

    @property
    def inputs(self) -> dict[str, Stored]:
        """Name -> how it is stored: x0, x1, ..., and `base` last where there is one."""
        found: dict[str, Stored] = {f"x{k}": stored for k, stored in enumerate(self.models)}
        if self.base:
            found["base"] = self.base
        return found


def fields(spec: MixSpec) -> dict[str, str]:
    """x0 [N], x1 [N], ..., base [N], out [N] as stored; shares [K], above [K], scale [1] float32;
    keys [K, 2] uint64; below, and the place `start` of the first number in its tensor; bad [1] int64: the
    first input with a number that is not finite, or -1.
    """
    return {
        **{name: f"const stored_{kind} *" for name, kind in spec.inputs.items()},
        "out": f"stored_{spec.out} *",
        "shares": "const float *",
        "above": "const float *",
        "scale": "const float *",
        "keys": "const uint64_t *",
        "below": "long",
        "start": "long",
        "N": "long",
        "bad": "int64_t *",
    }


def _step(spec: MixSpec) -> str:
    """One vector of every input -> one of the result."""
    arguments = [f"const stored_{kind} *{name}" for name, kind in spec.inputs.items()]
    lines = []
    for place, (name, kind) in enumerate(spec.inputs.items()):
        value = "b" if name == "base" else f"c{place}"
        lines.append(f"  part {value} = part_{kind}({name});")
        lines.append(f"  bad[{place}] |= wild({value});")
    for k in range(len(spec.models)):
        if spec.base:
            lines.append(f"  c{k} = c{k} - b;")
        if spec.keep == "above":
            lines.append(f"  c{k} = c{k} * one_where((part_of_u32)((part)lifted(c{k}) >= above[{k}]));")
        if spec.keep == "drawn":
            arguments.append(f"const uint16_t *d{k}")
            lines.append(f"  c{k} = c{k} * one_where((part_of_u32)(widened(d{k}) < below));")
        lines.append(f"  c{k} = c{k} * shares[{k}];")
    lines += _summed(len(spec.models)) if spec.join == "sum" else _elected(spec, len(spec.models))
    if spec.base:
        lines.append("  total = total + b;")
    arguments += [f"stored_{spec.out} *out", "const float *shares", "const float *above", "float scale"]
    arguments += ["uint32_t below", "part_of_u32 *bad"]
    body = "\n".join([*lines, f"  put_{spec.out}(out, total);"])
    return f"INLINE void step({', '.join(arguments)}) {{\n{body}\n}}\n"


def _summed(count: int) -> list[str]:
    return ["  part total = c0;", *(f"  total = total + c{k};" for k in range(1, count))]


def _elected(spec: MixSpec, count: int) -> list[str]:
    """As passes/merge/_elect.py: lead, its sign, the mean of those that have it."""
    if spec.join == "elected":
        lines = ["  part lead = c0;", *(f"  lead = lead + c{k};" for k in range(1, count))]
    else:
        lines = [
            "  part lead = {0};",
            *(f"  lead = lead + sign_of(c{k}) * shares[{k}];" for k in range(count)),
        ]
    lines += [
        "  const part_of_u32 down = (part_of_u32)lead & 0x80000000u;",
        "  part votes = {0}, total = {0};",
    ]
    for k in range(count):
        lines += [
            f"  c{k} = (part)((part_of_u32)c{k} ^ down);",
            f"  c{k} = (part)((part_of_u32)c{k} & ~(part_of_u32)(c{k} <= 0.0f));",
            f"  votes = votes + one_where((part_of_u32)(c{k} > 0.0f)) * shares[{k}];",
            f"  total = total + c{k};",
        ]
    return [
        *lines,
        "  const part_of_u32 few = (part_of_u32)(votes < TINY);   /* nothing is kept: 0 / TINY */",
        "  votes = (part)(((part_of_u32)votes & ~few) | (few & (part_of_u32)((part){0} + TINY)));",
        "  total = total / votes;",
        "  total = (part)((part_of_u32)total ^ down);",
        "  total = total * scale;",
    ]


_LANES = r"""
#define TINY 1.17549435e-38f
INLINE part one_where(part_of_u32 lanes) { return (part)(lanes & 0x3f800000u); }
INLINE part_of_u32 widened(const uint16_t *p) {
  part_of_u16 v;
  memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, part_of_u32);
}
INLINE part sign_of(part v) {   /* of what is no number, that */
  const part_of_u32 none = (part_of_u32)(v != v);
  const part sign = one_where((part_of_u32)(v > 0.0f)) - one_where((part_of_u32)(v < 0.0f));
  return (part)(((part_of_u32)sign & ~none) | ((part_of_u32)v & none));
}
"""


@cache
def emit(spec: MixSpec) -> str:
    """The self-contained file."""
    count, drawing = len(spec.models), spec.keep == "drawn"
    more = "a->shares, a->above, *a->scale, (uint32_t)a->below, bad"

    def call(of: str, out: str) -> str:
        draws = [f"d{k} + (i - from)" for k in range(count)] if drawing else []
        return f"step({', '.join([*(of.format(name) for name in spec.inputs), *draws, out, more])});"

    begin = []
    if drawing:
        begin.append("    const long place = a->start + from;")
        for k in range(count):
            begin.append(f"    draw(a->keys + {2 * k}, (uint64_t)(place / DRAWN), draws[{k}]);")
            begin.append(f"    const uint16_t *d{k} = draws[{k}] + place % DRAWN;")
    work = [
        "  const long N = a->N;",
        f"  part_of_u32 bad[{len(spec.inputs)}] = {{{{0}}}};",
        *([f"  uint16_t draws[{count}][COUNTS * DRAWN];"] if drawing else []),
        f"  for (long from = 0; from < N; from += {'CHUNK' if drawing else 'N'}) {{",
        f"    const long upto = {'from + CHUNK < N ? from + CHUNK : N' if drawing else 'N'};",
        *begin,
        "    long i = from;",
        f"    for (; i + LANES <= upto; i += LANES) {call('a->{} + i', 'a->out + i')}",
        "    if (i == upto) continue;",
        f"    stored_{spec.out} last_out[LANES];",
        padded(spec.inputs, call("last_{}", "last_out")),
        "    memcpy(a->out + i, last_out, sizeof *last_out * (size_t)(N - i));",
        "  }",
        "  *a->bad = -1;",
        f"  for (int k = {len(spec.inputs) - 1}; k >= 0; k--) if (any(bad[k])) *a->bad = k;",
    ]
    functions = (DRAWS if drawing else "") + _LANES + _step(spec)
    return whole_file(spec, functions, fields(spec), "\n".join(work))


def parse(data: Mapping[str, Any]) -> MixSpec:
    return MixSpec.model_validate(data)


def cases(spec: MixSpec) -> Iterator[Case]:
    """Fewer numbers than a vector, whole vectors, a rest; more than are drawn for at once, odd places."""
    count = len(spec.models)
    for size, start in ((5, 3), (64, 0), (2311, 1039)):
        dice = torch.Generator().manual_seed(size)
        numbers = {name: torch.randn(size, generator=dice) for name in spec.inputs}
        stored = {name: numbers[name].to(DTYPES[kind]) for name, kind in spec.inputs.items()}
        mix = Mix(
            [1.0 + 0.5 * k for k in range(count)],
            spec.join,
            spec.keep,
            [0.5 + 0.25 * k for k in range(count)],
            below=20000,
            seed=7,
            scale=0.75,
        )
        draws = [drawn(mix.seed, k, Spot("t", start), size) for k in range(count)]
        parts = [stored[f"x{k}"].float().numpy() for k in range(count)]
        base = stored["base"].float().numpy() if spec.base else None
        due = torch.from_numpy(mixed(mix, parts, base, draws)).to(DTYPES[spec.out])
        keys = [key_of(mix.seed, k, "t") for k in range(count)]
        words = [key >> shift & 0xFFFFFFFFFFFFFFFF for key in keys for shift in (0, 64)]
        given: dict[str, Argument] = {
            **stored,
            "out": torch.empty(size, dtype=DTYPES[spec.out]),
            "shares": torch.tensor(mix.shares),
            "above": torch.tensor(mix.above),
            "scale": torch.tensor([mix.scale]),
            "keys": torch.from_numpy(np.array(words, np.uint64).view(np.int64)),
            "below": mix.below,
            "start": start,
            "N": size,
            "bad": torch.empty(1, dtype=torch.int64),
        }
        yield Case(f"{size} numbers", given, {"out": due, "bad": torch.tensor([-1])}, 0)
