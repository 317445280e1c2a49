"""expert_linear in C: rows that stand by expert, each expert's through its own matrix and no other's.

Every member takes its share of the channels of every expert, so members have equal work whoever was chosen;
an expert that nobody chose is passed over.

Shapes: chosen [M, k] int32, rows [L, K] with L <= M k, W [E, N, K].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from effc.kernels.cpu.case import Argument, Case
from effc.kernels.cpu.entry import self_contained
from effc.kernels.cpu.stored import DTYPES
from effc.kernels.dense_linear import emit_c as dense_c
from effc.kernels.dense_linear.reference import reference as dense
from effc.kernels.dense_linear.spec import DenseLinearSpec
from effc.kernels.epilogue import operands
from effc.kernels.experts.spread import STARTS, SpreadSpec
from effc.kernels.experts.spread import reference as spread
from effc.kernels.kernel import KernelSpec
from effc.kernels.quant_linear import emit_c as quant_c
from effc.kernels.quant_linear.layout import pack
from effc.kernels.quant_linear.reference import quantize_rows
from effc.kernels.quant_linear.reference import reference as quant
from effc.kernels.quant_linear.spec import BLOCK, QuantLinearSpec


class ExpertLinearSpec(KernelSpec, frozen=True):
    """`dense` or `packed` for each expert on its rows; their epilogues have no operands."""

    op: ClassVar[str] = "expert_linear"
    version: ClassVar[int] = 2

    experts: int = Field(gt=0, le=4096)
    active: int = Field(gt=0)
    dense: DenseLinearSpec | None = None
    packed: QuantLinearSpec | None = None

    @model_validator(mode="after")
    def _possible(self) -> ExpertLinearSpec:
        if (self.dense is None) == (self.packed is None):
            raise ValueError("experts are dense or packed, one of both")
        if reads := operands((self.dense or self.each).epilogue):
            raise ValueError(f"experts have no {', '.join(reads)}")
        return self

    @property
    def each(self) -> QuantLinearSpec:
        """Of packed experts, the kernel of one."""
        if self.packed is None:
            raise ValueError("these experts are dense")
        return self.packed

    def bytes(self, chosen: int, n: int, k: int) -> int:
        """Bytes of the matrices [n, k] of `chosen` experts, which is what a token must read."""
        return chosen * (self.dense or self.each).bytes(n, k)


def inner(spec: ExpertLinearSpec) -> str:
    """The function of one expert, which `function` calls."""
    return dense_c.function(spec.dense) if spec.dense is not None else quant_c.function(spec.each)


def function(spec: ExpertLinearSpec) -> str:
    """`expert_linear_<key>` on blocks of channels first to last of every expert.

    Dense: x [L, K], w [E, N, K], w2 as w when paired; packed: xq, xs, xsum of rows [L, K], w [E, bytes],
    `apart` bytes from one expert to the next. M is the number of rows before they were spread.
    """
    head = f"""
  long edges[{spec.experts + 2}];
  starts(chosen, M * {spec.active}, {spec.experts}, edges);
  for (long e = 0; e < {spec.experts}; e++) {{
    const long at = edges[e], rows = edges[e + 1] - at;
    if (!rows) continue;"""
    if spec.dense is not None:
        kind, key = spec.dense.weight, spec.dense.key
        second = "w2 + e * N * K" if spec.dense.paired else "0"
        return f"""{STARTS}
static void expert_linear_{spec.key}(const int32_t *RESTRICT chosen, const float *RESTRICT x,
    const stored_{kind} *RESTRICT w, const stored_{kind} *RESTRICT w2, float *RESTRICT y,
    long M, long N, long K, long first, long last) {{{head}
    dense_linear_{key}(x + at * K, w + e * N * K, {second}, y + at * N, rows, N, K, first, last);
  }}
}}
"""
    return f"""{STARTS}
static void expert_linear_{spec.key}(const int32_t *RESTRICT chosen, const int8_t *RESTRICT xq,
    const float *RESTRICT xs, const int32_t *RESTRICT xsum, const uint8_t *RESTRICT w, long apart,
    float *RESTRICT y, long M, long N, long K, long first, long last) {{
  const long groups = {f"K / {spec.each.group}" if spec.each.group else "1"};{head}
    quant_linear_{spec.each.key}(xq + at * K, xs + at * groups, xsum + at * groups, w + e * apart, y + at * N,
      rows, N, K, first, last);
  }}
}}
"""


_X = {"x": "const float *", "w": "const void *", "w2": "const void *"}
_XQ = {"xq": "const int8_t *", "xs": "const float *", "xsum": "const int32_t *", "w": "const uint8_t *"}
_SIZES = {"y": "float *", "M": "long", "N": "long", "K": "long", "blocks": "long"}


@cache
def emit(spec: ExpertLinearSpec) -> str:
    """The self-contained file."""
    dense_too = spec.dense is not None
    fields = {"chosen": "const int32_t *"} | (_X if dense_too else _XQ | {"apart": "long"}) | _SIZES
    given = ", ".join(f"a->{name}" for name in fields if name != "blocks")
    work = (
        f"  expert_linear_{spec.key}({given},\n"
        "    a->blocks * member / members, a->blocks * (member + 1) / members);"
    )
    functions = ("" if dense_too else quant_c.QUANTIZE) + inner(spec) + function(spec)
    return self_contained(spec, functions, fields, work)


def parse(data: Mapping[str, Any]) -> ExpertLinearSpec:
    return ExpertLinearSpec.model_validate(data)


def cases(spec: ExpertLinearSpec) -> Iterator[Case]:
    """One row; more rows than a tile has for one expert, one that nobody chose; for kernels/cpu/check.py."""
    for m in (1, 11):
        dice = torch.Generator().manual_seed(m)
        chosen = torch.randint(0, spec.experts + 1, (m, spec.active), generator=dice).int()
        chosen[chosen == 1], chosen[0, 0] = 0, 0
        _, rows = spread(SpreadSpec(experts=spec.experts, active=spec.active), chosen)
        each = chosen.flatten().sort().values[: len(rows)].long()
        make = _dense_case if spec.dense is not None else _packed_case
        given, y = make(spec, m, each, dice)
        yield Case(f"{m} rows", {"chosen": chosen} | given, {"y": y}, 2e-6)


def _dense_case(
    spec: ExpertLinearSpec, m: int, each: Tensor, dice: torch.Generator
) -> tuple[dict[str, Argument], Tensor]:
    """Arguments behind `chosen`, and y [L, N]; `each` [L] is the expert of a row."""
    one, n, k = spec.dense or DenseLinearSpec(), 37, 50
    x = torch.randn(len(each), k, generator=dice)
    sides = [torch.randn(spec.experts, n, k, generator=dice).div(k**0.5).to(DTYPES[one.weight]) for _ in "12"]
    w, second = sides[0], sides[1] if one.paired else None
    lines = [
        dense(
            one,
            x[i : i + 1].double(),
            w[e].double(),
            second[e].double() if second is not None else None,
            {},
        )
        for i, e in enumerate(each.tolist())
    ]
    second = sides[1].contiguous() if one.paired else None
    given: dict[str, Argument] = {
        "x": x,
        "w": sides[0].contiguous(),
        "w2": second,
        "y": torch.empty(len(each), n),
    }
    return given | {"M": m, "N": n, "K": k, "blocks": -(-n // 16)}, torch.cat(lines)


def _packed_case(
    spec: ExpertLinearSpec, m: int, each: Tensor, dice: torch.Generator
) -> tuple[dict[str, Argument], Tensor]:
    one, n = spec.each, 32 if spec.each.paired else 70
    k, kind = 2 * one.group or 132, {"float16": torch.float16, "bfloat16": torch.bfloat16}[one.scale]
    rows, groups = n * (2 if one.paired else 1), one.groups(k)
    codes = torch.randint(0, 1 << one.bits, (spec.experts, rows, k), generator=dice, dtype=torch.uint8)
    scales = (torch.rand(spec.experts, rows, groups, generator=dice) * 0.02 + 0.01).to(kind)
    zeros = torch.randint(0, 1 << one.bits, (spec.experts, rows, groups), generator=dice, dtype=torch.uint8)
    packed = torch.stack([pack(one, c, s, z) for c, s, z in zip(codes, scales, zeros, strict=True)])
    x = torch.randn(len(each), k, generator=dice)
    xq, xs = quantize_rows(x, groups)
    lines = [
        quant(one, x[i : i + 1], codes[e], scales[e], None if one.symmetric else zeros[e], {})
        for i, e in enumerate(each.tolist())
    ]
    given: dict[str, Argument] = {"xq": xq, "xs": xs}
    given |= {"xsum": xq.view(len(each), groups, -1).sum(-1, dtype=torch.int32), "w": packed}
    given |= {"apart": packed[0].numel(), "y": torch.empty(len(each), n), "M": m, "N": n, "K": k}
    return given | {"blocks": -(-rows // BLOCK)}, torch.cat(lines)
