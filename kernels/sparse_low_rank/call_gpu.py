"""A linear of a thin product plus scattered numbers on a GPU, as a function that torch can differentiate."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from effc.kernels.gpu.load import load
from effc.kernels.sparse_low_rank.emit_triton import emit
from effc.kernels.sparse_low_rank.layout import Support
from effc.kernels.sparse_low_rank.spec import SparseLowRankSpec, refuses


def linear(
    spec: SparseLowRankSpec, x: Tensor, a: Tensor, b: Tensor, values: Tensor, support: Support, factor: float
) -> Tensor:
    """x [..., K], A [r, K], B [N, r], values [n] as `pack` was given their places, all bfloat16 -> [..., N].

    Slopes flow to x, A, B and values; neither W nor its slope is ever whole in memory.

    Raises:
        ValueError: the kernels cannot take it, in words.
        EffcError: E504 when Triton is not installed.
    """
    flat = x.flatten(0, -2)
    if words := refuses(spec, flat.shape[0], b.shape[0], a.shape[1], a.shape[0]):
        raise ValueError(words)
    kinds = {str(t.dtype) for t in (x, a, b, values)}
    if kinds != {"torch.bfloat16"}:
        raise ValueError(f"operands are {', '.join(sorted(kinds))}, the kernel takes torch.bfloat16")
    apply: Any = _Linear.apply
    y: Tensor = apply(spec, flat.contiguous(), a, b, values, support, factor)
    whole: Tensor = y.unflatten(0, x.shape[:-1])
    return whole


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: SparseLowRankSpec, *given: Any) -> Tensor:
        x, a, b, values, support, factor = given
        ordered = values[support.order]
        inner = x @ a.t() * factor
        y: Tensor = x.new_empty(x.shape[0], b.shape[0])
        _, wide = _filled(spec, a, b)
        load(emit(spec)).forward(x, support.bits, support.before, ordered, _rank(spec, inner), wide, y)
        ctx.save_for_backward(x, a, b, ordered, inner, *support)
        ctx.spec, ctx.factor = spec, factor
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        x, a, b, ordered, inner, bits, before, order = ctx.saved_tensors
        dy = dy.contiguous()
        module, outer = load(emit(ctx.spec)), dy @ b * ctx.factor
        tall, _ = _filled(ctx.spec, a, b)
        dx, slopes = torch.empty_like(x), torch.empty_like(ordered)
        module.backward(dy, bits, before, ordered, _rank(ctx.spec, outer), tall, dx)
        module.sampled(dy, x, bits, before, slopes)
        dvalues = torch.empty_like(slopes)
        dvalues[order] = slopes
        return None, dx, outer.t() @ x, dy.t() @ inner, dvalues, None, None


def _filled(spec: SparseLowRankSpec, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A and B with ranks of zeros up to that of the kernel."""
    return F.pad(a, (0, 0, 0, spec.rank - a.shape[0])).contiguous(), _rank(spec, b)


def _rank(spec: SparseLowRankSpec, x: Tensor) -> Tensor:
    """x [.., r] -> [.., rank of the kernel]"""
    return F.pad(x, (0, spec.rank - x.shape[-1])).contiguous()
