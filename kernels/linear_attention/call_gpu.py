"""Gated linear attention on a GPU as a function that torch can differentiate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from effc.kernels.gpu.load import load
from effc.kernels.linear_attention.emit_triton import emit
from effc.kernels.linear_attention.spec_gpu import LinearAttentionGpuSpec, refuses


def attend(
    spec: LinearAttentionGpuSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    past: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q [T, H, K], k [T, Hk, K], v [T, Hk, V], all bfloat16, log gates g [T, Hk, K or 1] float32.

    Gives o [T, H, V] and last [B, Hk, K, V] float32. starts [B + 1] int32 on the same device says where
    sequences begin; None is one sequence. past is like last, or None for zeros. Slopes flow to q, k, v, g
    and past.

    Raises:
        ValueError: the kernels cannot take it, in words.
        EffcError: E504 when Triton is not installed.
    """
    if words := refuses(spec, q.shape[0]) or _unfit(spec, q, k, v, g, past):
        raise ValueError(words)
    if starts is None:
        starts = torch.tensor([0, q.shape[0]], dtype=torch.int32, device=q.device)
    more = None if past is None else past.contiguous()
    apply: Any = _Attend.apply
    out, last = apply(spec, *(t.contiguous() for t in (q, k, v, g)), more, starts)
    return out, last


def step(spec: LinearAttentionGpuSpec, q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> Tensor:
    """One token of each of B sequences: q [B, H, K], k, v, g likewise -> o [B, H, V]; state is updated."""
    if words := _unfit(spec, q, k, v, g, state):
        raise ValueError(words)
    out = q.new_empty(q.shape[0], spec.heads, spec.value_dim)
    load(emit(spec)).step(*(t.contiguous() for t in (q, k, v, g)), state, out, state)
    return out


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: LinearAttentionGpuSpec, *given: Any) -> tuple[Tensor, Tensor]:
        q, k, v, g, past, starts = given
        out = q.new_empty(q.shape[0], spec.heads, spec.value_dim)
        shape = (starts.shape[0] - 1, spec.kv_heads, spec.key_dim, spec.value_dim)
        last = torch.empty(shape, dtype=torch.float32, device=q.device)
        kept = load(emit(spec)).forward(q, k, v, g, starts, past, out, last)
        ctx.spec = spec
        ctx.save_for_backward(q, k, v, g, past, starts, *kept)
        return out, last

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        dout, dlast = grad_outputs
        q, k, v, g, past, starts, *kept = ctx.saved_tensors
        slopes = [torch.empty_like(t) for t in (q, k, v, g)]
        dpast = torch.empty_like(dlast)
        load(emit(ctx.spec)).backward(
            dout.contiguous(), dlast.contiguous(), q, k, v, g, starts, past, *slopes, dpast, kept
        )
        return None, *slopes, None if past is None else dpast, None


def _unfit(
    spec: LinearAttentionGpuSpec, q: Tensor, k: Tensor, v: Tensor, g: Tensor, past: Tensor | None
) -> str | None:
    """What of these tensors is not as the spec says, in words."""
    shapes = {
        "q": (q, (spec.heads, spec.key_dim), torch.bfloat16),
        "k": (k, (spec.kv_heads, spec.key_dim), torch.bfloat16),
        "v": (v, (spec.kv_heads, spec.value_dim), torch.bfloat16),
        "g": (g, (spec.kv_heads, spec.gates), torch.float32),
    }
    for name, (t, shape, kind) in shapes.items():
        if tuple(t.shape) != (q.shape[0], *shape) or t.dtype != kind:
            due = f"[{q.shape[0]}, {', '.join(map(str, shape))}] {kind}"
            return f"{name} is {list(t.shape)} {t.dtype}, the kernel takes {due}"
    tail = [spec.kv_heads, spec.key_dim, spec.value_dim]
    if past is not None and (list(past.shape[1:]) != tail or past.dtype != torch.float32):
        return f"past is {list(past.shape)} {past.dtype}, the kernel takes {['B', *tail]} torch.float32"
    return None
