"""sparse_low_rank on a GPU, as the checks of kernels/gpu/check.py see it: its cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from effc.kernels.gpu.check import Case
from effc.kernels.sparse_low_rank.emit_triton import emit
from effc.kernels.sparse_low_rank.layout import pack
from effc.kernels.sparse_low_rank.reference import reference
from effc.kernels.sparse_low_rank.spec import SparseLowRankSpec

__all__ = ["cases", "emit", "launches", "parse"]


def parse(data: Mapping[str, Any]) -> SparseLowRankSpec:
    return SparseLowRankSpec.model_validate(data)


def cases(spec: SparseLowRankSpec) -> Iterator[Case]:
    """One number in a twentieth of all places, one in all, and runs without any; rows that do not divide."""
    yield from _three(spec, spec.rows + 5, n=128, k=192, share=0.05, seed=0)
    yield from _three(spec, 3, n=64, k=128, share=0.0, seed=1)


def launches(spec: SparseLowRankSpec) -> Iterator[Case]:
    yield from _three(spec, 256, n=256, k=256, share=0.05, seed=0)


def _three(spec: SparseLowRankSpec, m: int, n: int, k: int, share: float, seed: int) -> Iterator[Case]:
    dice = torch.Generator().manual_seed(seed)
    chosen = torch.rand(n * k, generator=dice) < share
    chosen[n * k // 2 : n * k // 2 + 80] = False
    chosen[-1] = True
    places = chosen.nonzero().view(-1)
    x, dy = (torch.randn(m, width, generator=dice).bfloat16() for width in (k, n))
    a = (torch.randn(spec.rank, k, generator=dice) / 8).bfloat16()
    b = (torch.randn(n, spec.rank, generator=dice) / spec.rank**0.5).bfloat16()
    values = torch.randn(places.numel(), generator=dice).bfloat16()
    support = pack(places, n, k)
    # What thin products give is handed in as it is rounded.
    inner, outer = (0.5 * x.float() @ a.float().t()).bfloat16(), (0.5 * dy.float() @ b.float()).bfloat16()
    shared: dict[str, Any] = {"bits": support.bits, "before": support.before}
    zero = torch.zeros_like(a).double()

    def sparse(t: Tensor, numbers: Tensor) -> Tensor:
        return reference(t.double(), zero, torch.zeros_like(b).double(), numbers, places, 1.0)

    def fore() -> dict[str, Tensor]:
        return {"out": sparse(x, values.double()) + inner.double() @ b.double().t()}

    def back() -> dict[str, Tensor]:
        wide = x.double().requires_grad_()
        (slope,) = torch.autograd.grad(sparse(wide, values.double()), wide, dy.double())
        return {"out": slope + outer.double() @ a.double()}

    def sampled() -> dict[str, Tensor]:
        wide = values.double().requires_grad_()
        return {"out": torch.autograd.grad(sparse(x, wide), wide, dy.double())[0]}

    label = f"{m} rows, {places.numel()} numbers in [{n}, {k}]"
    more = shared | {"values": values}
    yield Case(f"y of {label}", {"x": x, "inner": inner, "b": b} | more, fore, 2e-5, entry="forward")
    yield Case(f"dx of {label}", {"dy": dy, "outer": outer, "a": a} | more, back, 2e-5, entry="backward")
    yield Case(f"dv of {label}", {"dy": dy, "x": x} | shared, sampled, 2e-5, entry="sampled")
