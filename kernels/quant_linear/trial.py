"""Try the ways of quant_linear inside the program that holds it: one call on a part of one of its matrices.

No further text is compiled for it, and matrices of all layers take turns, so that they come from where they
come from when the program runs.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effc.kernels.cpu.ways import BUCKETS, TRIED
from effc.kernels.epilogue import operands
from effc.kernels.quant_linear.layout import columns
from effc.kernels.quant_linear.spec import BLOCK, QuantLinearSpec

MOST = 1 << 19
"""Weights of a matrix that one call works on, at most: a call takes less than a millisecond."""
OPERANDS = 4

_TEXT = r"""
#if defined(TILE_LOAD)
#ifndef TRIAL
#define TRIAL
struct trial {
  const struct team *team;
  long members, M, N, K;
  const int8_t *xq; const float *xs; const int32_t *xsum; const uint8_t *w; float *y;
  const float *operand[4];
};
#endif
static void try_$key(void *given, int member, int members) {
  const struct trial *a = given;
  const long blocks = (a->N + $columns - 1) / $columns;
  quant_linear_$key(a->xq, a->xs, a->xsum, a->w, a->y$pass, a->M, a->N, a->K,
                    blocks * member / members, blocks * (member + 1) / members);
}
void trial_$key(struct trial *a) { a->team->run(try_$key, a, (int)a->members); }
void go_$key(const signed char *ways) { memcpy(way_$key, ways, WAYS); }
#endif
"""


def function(spec: QuantLinearSpec) -> str:
    """`trial_<key>` is a call by the team, `go_<key>` fills the table of ways; both follow the kernel."""
    passed = "".join(f", a->operand[{i}]" for i in range(len(operands(spec.epilogue))))
    columns = str(BLOCK // 2 if spec.paired else BLOCK)
    return _TEXT.replace("$key", spec.key).replace("$pass", passed).replace("$columns", columns)


class _Arguments(ctypes.Structure):
    _fields_ = (
        ("team", ctypes.c_void_p),
        *((name, ctypes.c_long) for name in ("members", "M", "N", "K")),
        *((name, ctypes.c_void_p) for name in ("xq", "xs", "xsum", "w", "y")),
        ("operand", ctypes.c_void_p * OPERANDS),
    )


class Trial:
    """One kernel of a loaded program, with rows of random bytes to be called on."""

    def __init__(self, library: Any, spec: QuantLinearSpec, matrices: Sequence[Tensor]) -> None:
        """`matrices`: packed as in layout.py, each [N / 64, G, *]; the width of the first stands for all."""
        self.k = k = columns(spec, matrices[0])
        self.matrices = [m for m in matrices if m.shape[1:] == matrices[0].shape[1:]]
        self.blocks = max(1, min(min(m.shape[0] for m in self.matrices), MOST // (BLOCK * k)))
        self.n = self.blocks * BLOCK // (2 if spec.paired else 1)
        rows, groups = max(TRIED), spec.groups(k)
        dice = torch.Generator().manual_seed(0)
        self.xq = torch.randint(-127, 128, (rows, k), generator=dice, dtype=torch.int8)
        self.xs, self.xsum = torch.ones(rows, groups), torch.zeros(rows, groups, dtype=torch.int32)
        self.y = torch.empty(rows, self.n)
        self.operand = torch.zeros(rows * self.n)
        self.entry, self.go = library[f"trial_{spec.key}"], library[f"go_{spec.key}"]
        self.entry.restype = self.go.restype = None
        self.calls = 0

    def seconds(self, way: int, m: int, team: int, members: int) -> float:
        """Time of one call with m rows that goes one way."""
        self.take([way] * len(BUCKETS))
        matrix = self.matrices[self.calls % len(self.matrices)]
        parts = matrix.shape[0] // self.blocks
        part = self.calls // len(self.matrices) % parts * self.blocks
        self.calls += 1
        given = _Arguments(
            team, members, m, self.n, self.k, self.xq.data_ptr(), self.xs.data_ptr(), self.xsum.data_ptr(),
            matrix[part].data_ptr(), self.y.data_ptr(),
            (ctypes.c_void_p * OPERANDS)(*[self.operand.data_ptr()] * OPERANDS),
        )  # fmt: skip
        start = time.perf_counter()
        self.entry(ctypes.byref(given))
        return time.perf_counter() - start

    def take(self, ways: Sequence[int]) -> None:
        """From now on calls of each bucket go these ways."""
        self.go((ctypes.c_byte * len(ways))(*ways))
