"""counts in C: how the magnitudes of changes are spread, for a threshold by radix and not by sorting.

|x - base| as bits orders as integers do. The upper 15 bits are counted first, one table a model; then, within
the one bin that holds a threshold, the lower 16 bits are gathered. About 2 cycles a number and model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from effc.kernels.cpu.case import Argument, Case
from effc.kernels.cpu.stored import DTYPES, Stored
from effc.kernels.kernel import KernelSpec
from effc.kernels.merge.text import padded, whole_file

HIGH = 1 << 15
"""Bins of the upper halves: exponent and the upper 7 bits of the mantissa of a float32 without its sign."""


class CountsSpec(KernelSpec, frozen=True):
    """The upper halves of |x - base|, counted; or the lower halves of those that have a given upper half."""

    op: ClassVar[str] = "counts"
    version: ClassVar[int] = 1

    form: Literal["upper", "lower"]
    models: tuple[Stored, ...] = Field(min_length=1)
    base: Stored

    @property
    def inputs(self) -> dict[str, Stored]:
        found: dict[str, Stored] = {f"x{k}": stored for k, stored in enumerate(self.models)}
        found["base"] = self.base
        return found


def fields(spec: CountsSpec) -> dict[str, str]:
    """x0 [N], ..., base [N] as stored; bad as in mix.

    upper: counts [K, HIGH] int64, added to. lower: bins [K] uint32, the upper halves times 2^16; rows [K, N]
    uint32, of which the first found [K] int64 are written.
    """
    inputs = {name: f"const stored_{kind} *" for name, kind in spec.inputs.items()}
    own = (
        {"counts": "int64_t *"}
        if spec.form == "upper"
        else {"bins": "const uint32_t *", "rows": "uint32_t *", "found": "int64_t *"}
    )
    return inputs | {"N": "long"} | own | {"bad": "int64_t *"}


_TAKE = {
    "upper": """INLINE void taken(part_of_u32 bits, int count, int64_t *counts) {
  uint32_t high[LANES];
  bits >>= 16;
  memcpy(high, &bits, sizeof high);
  for (int i = 0; i < count; i++) counts[high[i]]++;
}
""",
    "lower": """INLINE void taken(part_of_u32 bits, int count, uint32_t bin, uint32_t *row, int64_t *found) {
  bits = bits - bin;                                  /* below 2^16 for those in the bin */
  if (!any((part_of_u32)(bits < 65536u))) return;
  for (int i = 0; i < count; i++) if (bits[i] < 65536u) row[(*found)++] = bits[i];
}
""",
}


@cache
def emit(spec: CountsSpec) -> str:
    """The self-contained file."""
    count, names = len(spec.models), spec.inputs
    own = {
        "upper": f"a->counts + {HIGH}L * {{0}}",
        "lower": "a->bins[{0}], a->rows + N * {0}, a->found + {0}",
    }[spec.form]
    lines = [f"  part b = part_{spec.base}(base);", f"  bad[{count}] |= wild(b);"]
    for k, kind in enumerate(spec.models):
        lines.append(f"  part c{k} = part_{kind}(x{k});")
        lines.append(f"  bad[{k}] |= wild(c{k});")
        lines.append(f"  taken(lifted(c{k} - b), count, {own.format(k)});")
    arguments = ", ".join(f"const stored_{kind} *{name}" for name, kind in names.items())
    step = f"""{_TAKE[spec.form]}
INLINE void step({arguments}, int count, const struct arguments *a, long N, part_of_u32 *bad) {{
{chr(10).join(lines)}
}}
"""

    def call(of: str, numbers: str) -> str:
        return f"step({', '.join(of.format(name) for name in names)}, {numbers}, a, N, bad);"

    zero = "" if spec.form == "upper" else f"  for (int k = 0; k < {count}; k++) a->found[k] = 0;\n"
    work = f"""  const long N = a->N;
  part_of_u32 bad[{count + 1}] = {{{{0}}}};
{zero}  long i = 0;
  for (; i + LANES <= N; i += LANES) {call("a->{} + i", "LANES")}
  if (i < N) {{
{padded(names, call("last_{}", "(int)(N - i)"))}
  }}
  *a->bad = -1;
  for (int k = {count}; k >= 0; k--) if (any(bad[k])) *a->bad = k;"""
    return whole_file(spec, step, fields(spec), work)


def parse(data: Mapping[str, Any]) -> CountsSpec:
    return CountsSpec.model_validate(data)


def cases(spec: CountsSpec) -> Iterator[Case]:
    """Fewer than a vector, and a rest; a change that is infinite, and bins that hold some."""
    for size in (5, 1003):
        dice = torch.Generator().manual_seed(size)
        numbers = {name: torch.randn(size, generator=dice) for name in spec.inputs}
        if {*spec.models, spec.base} == {"float32"}:
            numbers["x0"][3], numbers["base"][3] = 3e38, -3e38
        stored = {name: numbers[name].to(DTYPES[kind]) for name, kind in spec.inputs.items()}
        wide = {name: tensor.float().numpy() for name, tensor in stored.items()}
        with np.errstate(over="ignore"):
            bits = [np.abs(wide[f"x{k}"] - wide["base"]).view(np.uint32) for k in range(len(spec.models))]
        given: dict[str, Argument] = {**stored, "N": size}
        due: dict[str, torch.Tensor] = {}
        if spec.form == "upper":
            rows = np.stack([np.bincount(row >> 16, minlength=HIGH) for row in bits])
            # what a table holds before is poison to the checks, minus one in every bin: it is added to
            given["counts"], due["counts"] = (
                torch.empty(rows.shape, dtype=torch.int64),
                torch.from_numpy(rows - 1),
            )
        else:
            bins = [np.uint32(row[0] >> 16 << 16) for row in bits]
            low = [row[(row & 0xFFFF0000) == b] & 0xFFFF for row, b in zip(bits, bins, strict=True)]
            most = np.full((len(bits), size), -1, np.int32)
            for k, row in enumerate(low):
                most[k, : row.size] = row
            given["bins"] = torch.from_numpy(np.array(bins, np.uint32).view(np.int32))
            given["rows"], due["rows"] = torch.empty(most.shape, dtype=torch.int32), torch.from_numpy(most)
            given["found"] = torch.empty(len(bits), dtype=torch.int64)
            due["found"] = torch.tensor([row.size for row in low])
        given["bad"], due["bad"] = torch.empty(1, dtype=torch.int64), torch.tensor([-1])
        yield Case(f"{spec.form} of {size}", given, due, 0)
