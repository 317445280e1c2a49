"""combine in C: what the experts of a row gave, weighted, added up in the order in which they were chosen.

Shapes: z [L, D] by expert, place [M, k] int32 into it (-1: no expert), weights [M, k] -> y [M, D].
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


class CombineSpec(KernelSpec, frozen=True):
    """y[m] = residual[m] + sum over j of weights[m, j] z[place[m, j]]; float32."""

    op: ClassVar[str] = "combine"
    version: ClassVar[int] = 1

    active: int = Field(gt=0)
    """k"""
    weighted: bool = True
    residual: bool = False


def reference(spec: CombineSpec, z: Tensor, place: Tensor, weights: Tensor, residual: Tensor) -> Tensor:
    """z [L, D], place and weights [M, k], residual [M, D] -> y [M, D] in the precision of z."""
    by = weights if spec.weighted else torch.ones_like(weights)
    terms = z[place.clamp(min=0).long()] * (by * (place >= 0)).unsqueeze(-1)
    return terms.sum(1) + (residual if spec.residual else 0)


def function(spec: CombineSpec) -> str:
    """`combine_<key>` on rows first to last; y may be residual. Weights and residual may be null if unused.

    An expert that was left out counts as its weight times 0, so that a weight that is no number is seen.
    """
    weighted = f"weights[m * {spec.active} + j]"
    by = f"{weighted} * " if spec.weighted else ""
    add = f"s += {by}take(z + at * D + d, D - d)"
    skip = f"s += {weighted} * 0.0f" if spec.weighted else ""
    start = "take(residual + m * D + d, D - d) + s" if spec.residual else "s"
    return f"""
static void combine_{spec.key}(const float *RESTRICT z, const int32_t *RESTRICT place,
    const float *RESTRICT weights, const float *residual, float *y, long D, long first, long last) {{
  for (long m = first; m < last; m++)
    for (long d = 0; d < D; d += 16) {{
      f32x16 s = {{0}};
      for (long j = 0; j < {spec.active}; j++) {{
        const long at = place[m * {spec.active} + j];
        if (at < 0) {{ {skip}; continue; }}
        {add};
      }}
      give(y + m * D + d, {start}, D - d);
    }}
}}
"""


FIELDS = {
    "z": "const float *",
    "place": "const int32_t *",
    "weights": "const float *",
    "residual": "const float *",
    "y": "float *",
    "M": "long",
    "D": "long",
}


@cache
def emit(spec: CombineSpec) -> str:
    """The self-contained file."""
    work = (
        f"  combine_{spec.key}(a->z, a->place, a->weights, a->residual, a->y, a->D,\n"
        "    a->M * member / members, a->M * (member + 1) / members);"
    )
    return self_contained(spec, function(spec), FIELDS, work)


def parse(data: Mapping[str, Any]) -> CombineSpec:
    return CombineSpec.model_validate(data)


def cases(spec: CombineSpec) -> Iterator[Case]:
    """Widths below a vector and with a rest; an expert left out; for kernels/cpu/check.py."""
    for m, d in ((1, 7), (6, 53)):
        dice = torch.Generator().manual_seed(m)
        live = m * spec.active
        place = torch.randperm(live, generator=dice).view(m, spec.active).int()
        place[0, -1] = -1
        z, residual = torch.randn(live, d, generator=dice), torch.randn(m, d, generator=dice)
        weights = torch.rand(m, spec.active, generator=dice)
        due = reference(spec, z.double(), place, weights.double(), residual.double())
        given: dict[str, Argument] = {"z": z, "place": place, "weights": weights if spec.weighted else None}
        given |= {"residual": residual if spec.residual else None, "y": torch.empty(m, d), "M": m, "D": d}
        yield Case(f"{m} rows of {d}", given, {"y": due}, 1e-6)
