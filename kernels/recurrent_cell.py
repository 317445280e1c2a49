"""recurrent_cell in C: a gated cell whose recurrent weights are diagonal, over rows of any mix of sequences.

A channel never meets another, so members share channels, and each lets its own pass over all rows in order.
Shapes: u of three gates [M, d], a [P, d], states [slots, S, d] -> y [M, d].
Source: ParaRNN, arXiv 2510.21450.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from effc.compiler.newton import CELLS, PEEPS, STATES
from effc.kernels.cpu.case import Argument, Case
from effc.kernels.cpu.entry import self_contained
from effc.kernels.kernel import KernelSpec


class RecurrentCellSpec(KernelSpec, frozen=True):
    """The cells of compiler/newton.py; a state is zero at position 0 of its sequence. All float32.

    gru: z, r, c from u and a h; h' = (1 - z) h + z c. lstm_cifg: f, k, o from u and a h, f and o from c too;
    c' = f c + (1 - f) k, h' = o tanh c'.
    """

    op: ClassVar[str] = "recurrent_cell"
    version: ClassVar[int] = 1

    cell: Literal["gru", "lstm_cifg"]
    width: int
    """d"""

    @property
    def state(self) -> int:
        """Numbers in the state of one sequence."""
        return STATES[self.cell] * self.width


def reference(
    spec: RecurrentCellSpec, u: Tensor, a: Tensor, slot: Tensor, position: Tensor, states: Tensor
) -> Tensor:
    """u [M, 3, d], a [P, d], states [slots, S, d], which change in place -> y [M, d]."""
    rows = []
    for m, (sequence, at) in enumerate(zip(slot.tolist(), position.tolist(), strict=True)):
        if at == 0:
            states[sequence] = 0
        states[sequence], _ = CELLS[spec.cell](states[sequence], u[m], a)
        rows.append(states[sequence, -1].clone())
    return torch.stack(rows)


_STEPS = {
    "gru": """      const f32x16 z = sigmoid(a0 * h + take(u0 + at, count));
      const f32x16 r = sigmoid(a1 * h + take(u1 + at, count));
      const f32x16 c = hyperbolic_tangent(a2 * r * h + take(u2 + at, count));
      h = (1.0f - z) * h + z * c;""",
    "lstm_cifg": """      const f32x16 f = sigmoid(a0 * h + take(u0 + at, count) + a3 * c);
      const f32x16 k = hyperbolic_tangent(a1 * h + take(u1 + at, count));
      c = f * c + (1.0f - f) * k;
      h = sigmoid(a2 * h + take(u2 + at, count) + a4 * c) * hyperbolic_tangent(c);""",
}


def function(spec: RecurrentCellSpec) -> str:
    """`recurrent_cell_<key>` on vectors of 16 channels first to last; u and y hold rows of d numbers."""
    d, two = spec.width, STATES[spec.cell] == 2
    held = "\n".join(
        f"    const f32x16 a{i} = take(a + {i * d} + n, count);" for i in range(PEEPS[spec.cell])
    )
    state = f"states + slot[m] * {spec.state}"
    read = f"f32x16 c = take({state} + n, count), h = take({state} + {d} + n, count);"
    empty = "if (position[m] == 0) c = h = all(0.0f);"
    kept = f"give({state} + n, c, count);\n      give({state} + {d} + n, h, count);"
    if not two:
        read, empty = f"f32x16 h = take({state} + n, count);", "if (position[m] == 0) h = all(0.0f);"
        kept = f"give({state} + n, h, count);"
    return f"""
static void recurrent_cell_{spec.key}(const float *RESTRICT u0, const float *RESTRICT u1,
    const float *RESTRICT u2, const float *RESTRICT a, const int64_t *RESTRICT slot,
    const int64_t *RESTRICT position, float *RESTRICT states, float *RESTRICT y, long M,
    long first, long last) {{
  for (long n = first * 16; n < last * 16; n += 16) {{
    const long count = {d} - n;
{held}
    for (long m = 0; m < M; m++) {{
      const long at = m * {d} + n;
      {read}
      {empty}
{_STEPS[spec.cell]}
      {kept}
      give(y + at, h, count);
    }}
  }}
}}
"""


FIELDS: dict[str, str] = dict.fromkeys(("u0", "u1", "u2", "a"), "const float *")
FIELDS |= dict.fromkeys(("slot", "position"), "const int64_t *")
FIELDS |= {"states": "float *", "y": "float *", "M": "long"}


@cache
def emit(spec: RecurrentCellSpec) -> str:
    """The self-contained file."""
    blocks = -(-spec.width // 16)
    work = (
        f"  recurrent_cell_{spec.key}(a->u0, a->u1, a->u2, a->a, a->slot, a->position, a->states, a->y,\n"
        f"    a->M, {blocks}L * member / members, {blocks}L * (member + 1) / members);"
    )
    return self_contained(spec, function(spec), FIELDS, work)


def parse(data: Mapping[str, Any]) -> RecurrentCellSpec:
    return RecurrentCellSpec.model_validate(data)


def cases(spec: RecurrentCellSpec) -> Iterator[Case]:
    """Two sequences in one call, then a token of each, one of them new; for kernels/cpu/check.py."""
    dice = torch.Generator().manual_seed(spec.width)
    states = torch.full((2, STATES[spec.cell], spec.width), torch.nan, dtype=torch.float64)
    peep = torch.randn(PEEPS[spec.cell], spec.width, generator=dice)
    for plan in ([(0, 0), (1, 0), (0, 1), (0, 2)], [(0, 3), (1, 0)]):
        slot, position = torch.tensor(plan).T.contiguous()
        u = torch.randn(3, len(plan), spec.width, generator=dice)
        before = states.float()
        y = reference(spec, u.transpose(0, 1).double(), peep.double(), slot, position, states)
        given: dict[str, Argument] = {f"u{i}": part.contiguous() for i, part in enumerate(u)}
        given |= {"a": peep, "slot": slot, "position": position, "states": before}
        yield Case(f"{len(plan)} rows", given | {"y": torch.empty(y.shape), "M": len(plan)}, {"y": y}, 2e-6)
