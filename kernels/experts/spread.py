"""spread in C: rows copied side by side for each expert, so that an expert reads its rows as one matrix.

Shapes: chosen [M, k] int32, E for no expert -> place [M, k] int32, -1 for none. Places of expert e come
before those of e + 1, in the order of the rows. What is copied has M rows and goes to M k at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from effc.kernels.cpu.case import Argument, Case
from effc.kernels.cpu.entry import self_contained
from effc.kernels.kernel import KernelSpec

STARTS = """
#ifndef STARTS
#define STARTS
/* edges [E + 2]: expert e has the places edges[e] to edges[e + 1]; `size` choices, E for no expert */
static void starts(const int32_t *RESTRICT chosen, long size, long E, long *RESTRICT edges) {
  for (long e = 0; e < E + 2; e++) edges[e] = 0;
  for (long i = 0; i < size; i++) edges[chosen[i] + 1]++;
  for (long e = 0; e < E; e++) edges[e + 1] += edges[e];
}
#endif
"""


class SpreadSpec(KernelSpec, frozen=True):
    """Up to three arrays of M rows, each row copied to the places of its k experts, byte by byte."""

    op: ClassVar[str] = "spread"
    version: ClassVar[int] = 1

    experts: int = Field(gt=0, le=4096)
    active: int = Field(gt=0)


def reference(spec: SpreadSpec, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """chosen [M, k] -> place [M, k] int32, and which row [live] stands in each place."""
    slots = chosen.flatten().long()
    order = slots.argsort(stable=True)[: int((slots < spec.experts).sum())]
    place = torch.full_like(slots, -1)
    place[order] = torch.arange(len(order))
    return place.view_as(chosen).int(), order // spec.active


def function(spec: SpreadSpec) -> str:
    """`spread_<key>` on rows first to last of M; the bytes of a row are 0 where there is no array."""
    arrays = "".join(
        f",\n    const void *RESTRICT {n}, void *RESTRICT to_{n}, long bytes_{n}" for n in ("a", "b", "c")
    )
    copies = "\n".join(
        f"    if (bytes_{n}) memcpy((char *)to_{n} + at * bytes_{n}, "
        f"(const char *){n} + i / {spec.active} * bytes_{n}, bytes_{n});"
        for n in ("a", "b", "c")
    )
    return f"""{STARTS}
static void spread_{spec.key}(const int32_t *RESTRICT chosen, int32_t *RESTRICT place, long M{arrays},
    long first, long last) {{
  long next[{spec.experts + 2}];
  starts(chosen, M * {spec.active}, {spec.experts}, next);
  for (long i = 0; i < last * {spec.active}; i++) {{
    const int32_t e = chosen[i];
    const long at = e < {spec.experts} ? next[e]++ : -1;
    if (i < first * {spec.active}) continue;
    place[i] = (int32_t)at;
    if (at < 0) continue;
{copies}
  }}
}}
"""


FIELDS = {
    "chosen": "const int32_t *",
    "place": "int32_t *",
    "x": "const float *",
    "y": "float *",
    "q": "const int8_t *",
    "p": "int8_t *",
    "M": "long",
    "D": "long",
}


@cache
def emit(spec: SpreadSpec) -> str:
    """The self-contained file: rows of D floats and of D bytes."""
    work = (
        f"  spread_{spec.key}(a->chosen, a->place, a->M, a->x, a->y, 4 * a->D, a->q, a->p, a->D, 0, 0, 0,\n"
        "    a->M * member / members, a->M * (member + 1) / members);"
    )
    return self_contained(spec, function(spec), FIELDS, work)


def parse(data: Mapping[str, Any]) -> SpreadSpec:
    return SpreadSpec.model_validate(data)


def cases(spec: SpreadSpec) -> Iterator[Case]:
    """Rows of several experts, some without one, experts that nobody chose; for kernels/cpu/check.py."""
    for m, d in ((1, 5), (9, 19)):
        dice = torch.Generator().manual_seed(m)
        chosen = torch.randint(0, spec.experts + 1, (m, spec.active), generator=dice).int()
        chosen[chosen == 1] = 0
        place, rows = reference(spec, chosen)
        x = torch.randn(m, d, generator=dice)
        q = torch.randint(-127, 128, (m, d), generator=dice, dtype=torch.int8)
        due = {"place": place} | ({"y": x[rows], "p": q[rows]} if len(rows) else {})
        given: dict[str, Argument] = {"chosen": chosen, "place": torch.empty_like(place), "x": x}
        given |= {"y": torch.empty(len(rows), d), "q": q}
        given |= {"p": torch.empty(len(rows), d, dtype=torch.int8), "M": m, "D": d}
        yield Case(f"{m} rows of {d}", given, due, 0.0)
