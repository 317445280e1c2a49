"""attention on a GPU, as the checks of kernels/gpu/check.py see it: its cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from effc.kernels.attention.emit_triton import emit
from effc.kernels.attention.reference import reference
from effc.kernels.attention.spec import AttentionGpuSpec
from effc.kernels.gpu.check import Case

__all__ = ["cases", "emit", "launches", "parse"]

OFF = 6e-3
"""of the largest result: weights and slopes are rounded to bfloat16"""


def parse(data: Mapping[str, Any]) -> AttentionGpuSpec:
    return AttentionGpuSpec.model_validate(data)


def cases(spec: AttentionGpuSpec) -> Iterator[Case]:
    """Sequences of one token, of less than a tile, and of several with a rest; one that fills a tile."""
    yield from _pair(spec, (1, 37, 2 * spec.forward.queries + 21), seed=0)
    yield from _pair(spec, (spec.forward.queries,), seed=1)


def launches(spec: AttentionGpuSpec) -> Iterator[Case]:
    yield from _pair(spec, (96, 160), seed=0)


def _pair(spec: AttentionGpuSpec, lengths: tuple[int, ...], seed: int) -> Iterator[Case]:
    dice, t = torch.Generator().manual_seed(seed), sum(lengths)
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    q, do = (torch.randn(t, spec.heads, spec.head_dim, generator=dice).bfloat16() for _ in range(2))
    k, v = (torch.randn(t, spec.kv_heads, spec.head_dim, generator=dice).bfloat16() for _ in range(2))
    wide_q, wide_k, wide_v = leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = reference(spec, wide_q, wide_k, wide_v, starts)

    def forward() -> dict[str, Tensor]:
        return {"out": out.detach(), "lse": lse.detach()}

    def backward() -> dict[str, Tensor]:
        slopes = torch.autograd.grad(out, leaves, do.double(), retain_graph=True)
        return dict(zip(("dq", "dk", "dv"), slopes, strict=True))

    given: dict[str, Any] = {"q": q, "k": k, "v": v, "starts": starts}
    yield Case(f"forward {lengths}", given, forward, OFF, entry="forward")
    given |= {"dout": do, "out": out.detach().bfloat16(), "lse": lse.detach().float()}
    yield Case(f"backward {lengths}", given, backward, OFF, entry="backward")
