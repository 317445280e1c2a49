"""choose_token: the greedy choice, the index of the largest logit of each row, in C.

A row is scanned in parts, so that members can share it; the best of the parts is the same whatever the parts
are: the largest number, the lowest index among equals, and not-a-number before any number, as torch.argmax.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from effc.kernels.cpu.case import Argument, Case
from effc.kernels.cpu.entry import launch, self_contained
from effc.kernels.cpu.isa import Isa
from effc.kernels.kernel import KernelSpec


class ChooseTokenSpec(KernelSpec, frozen=True):
    """logits [W, V] float32 -> tokens [W] int64, 0 < V < 2^31."""

    op: ClassVar[str] = "choose_token"
    version: ClassVar[int] = 1


def reference(logits: Tensor) -> Tensor:
    """logits [W, V] -> the first index of the largest of each row [W] int64."""
    spoiled = logits.isnan()
    plain = torch.where(spoiled, float("inf"), logits)
    most = torch.where(spoiled.any(-1, keepdim=True), spoiled, plain == plain.amax(-1, keepdim=True))
    return most.int().argmax(-1)


def function(spec: ChooseTokenSpec) -> str:
    """Two functions, with a meeting of the members between them when parts of one row are shared.

    `choose_parts_<key>`: items first to last of W * parts -> best [W, parts] and where [W, parts];
    `choose_token_<key>`: rows first to last of best and where -> token [W]. parts <= V.
    """
    return f"""
/* a comes before b: larger, or the first that is not a number, or as large and earlier */
INLINE int before_{spec.key}(float a, long i, float b, long j) {{
  if ((a != a) != (b != b)) return a != a;
  return a > b || ((a == b || a != a) && i < j);
}}

static void choose_parts_{spec.key}(const float *RESTRICT logits, long V, long parts,
    float *RESTRICT best, long *RESTRICT where, long first, long last) {{
  const i32x16 lanes = {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}};
  for (long item = first; item < last; item++) {{
    const long part = item % parts, from = V * part / parts, to = V * (part + 1) / parts;
    const float *p = logits + item / parts * V;
    f32x16 most = all(-INFINITY);
    i32x16 at = lanes + (int32_t)from;
    for (long v = from; v < to; v += 16) {{
      f32x16 a = take(p + v, to - v);
      if (to - v < 16) a = choose(lanes < (int32_t)(to - v), a, all(-INFINITY));
      i32x16 win = (a > most) | ((a != a) & (most == most));
      most = choose(win, a, most);
      at = (win & (lanes + (int32_t)v)) | (~win & at);
    }}
    float b = most[0];
    long w = at[0];
    for (int i = 1; i < 16; i++) if (before_{spec.key}(most[i], at[i], b, w)) {{ b = most[i]; w = at[i]; }}
    best[item] = b;
    where[item] = w;
  }}
}}

static void choose_token_{spec.key}(const float *RESTRICT best, const long *RESTRICT where, long parts,
    long *RESTRICT token, long first, long last) {{
  for (long row = first; row < last; row++) {{
    float b = best[row * parts];
    long w = where[row * parts];
    for (long i = row * parts + 1; i < (row + 1) * parts; i++)
      if (before_{spec.key}(best[i], where[i], b, w)) {{ b = best[i]; w = where[i]; }}
    token[row] = w;
  }}
}}
"""


FIELDS = {
    "logits": "const float *",
    "best": "float *",
    "where": "long *",
    "token": "long *",
    "W": "long",
    "V": "long",
    "parts": "long",
}


@cache
def emit(spec: ChooseTokenSpec) -> str:
    """The self-contained file."""
    work = f"""  const long items = a->W * a->parts;
  choose_parts_{spec.key}(a->logits, a->V, a->parts, a->best, a->where,
                 items * member / members, items * (member + 1) / members);
  a->team->meet(members);
  choose_token_{spec.key}(a->best, a->where, a->parts, a->token,
                 a->W * member / members, a->W * (member + 1) / members);"""
    return self_contained(spec, function(spec), FIELDS, work)


def choose_token(isa: Isa, logits: Tensor, parts: int, threads: int) -> Tensor:
    """logits [W, V] float32 contiguous, each row in `parts` <= V -> tokens [W] int64.

    Raises:
        ValueError: a row is empty, of 2^31 or more, or shorter than its parts.
    """
    rows, size = logits.shape
    if not 0 < parts <= size < 2**31:
        raise ValueError(f"{parts} parts of a row of {size} logits")
    best, where = torch.empty(rows, parts), torch.empty(rows, parts, dtype=torch.int64)
    token = torch.empty(rows, dtype=torch.int64)
    spec = ChooseTokenSpec()
    launch(emit(spec), spec.op, isa, threads, logits, best, where, token, rows, size, parts)
    return token


def parse(data: Mapping[str, Any]) -> ChooseTokenSpec:
    return ChooseTokenSpec.model_validate(data)


def cases(spec: ChooseTokenSpec) -> Iterator[Case]:
    """Rows in one part and in several that fill no vector, equals among them; for kernels/cpu/check.py."""
    for w, v, parts in ((1, 5, 1), (3, 75, 4), (2, 130, 3)):
        logits = -1.0 - torch.randint(0, 40, (w, v), generator=torch.Generator().manual_seed(v)).float()
        best, where = torch.empty(w, parts), torch.empty(w, parts, dtype=torch.int64)
        token = torch.empty(w, dtype=torch.int64)
        given: dict[str, Argument] = {"logits": logits, "best": best, "where": where, "token": token}
        given |= {"W": w, "V": v, "parts": parts}
        yield Case(f"[{w}, {v}] in {parts}", given, {"token": reference(logits)}, 0.0, ("best", "where"))
