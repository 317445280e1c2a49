"""Ops: the closed set of typed operations that blocks expand into. Lowering and analysis see only these.

Those of mixtures stand in ops_experts.py, of recurrent blocks in ops_state.py, of maps that layers share in
ops_maps.py, of loops that some tokens run in ops_tokens.py.

Shapes: B sequences, T tokens, S keys, N tokens in a row, d width, H heads of width h.
Each op is its definition: positional arguments are values, keyword arguments are attributes. Nothing is
written in place; the cache is a value that goes in and comes out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effc.compiler.blocks.attention import attend as _attend
from effc.compiler.blocks.hashed_linear import laid as _laid
from effc.compiler.blocks.hashed_linear import signs as _signs
from effc.compiler.blocks.hashed_linear import where as _where
from effc.compiler.blocks.head import softcap as _softcap
from effc.compiler.blocks.mlp import ACTIVATIONS
from effc.compiler.blocks.rope import rotate, tables
from effc.compiler.blocks.sparse_low_rank_linear import built
from effc.compiler.blocks.unit import DTYPES
from effc.compiler.op_kind import OPS, Kind
from effc.compiler.op_kind import op as _op
from effc.compiler.ops_coded import on_grid
from effc.compiler.ops_experts import combine
from effc.compiler.ops_maps import heard
from effc.compiler.ops_state import scan
from effc.compiler.ops_tokens import enter
from effc.compiler.packing import unpack as _unpack
from effc.compiler.planes import dense as _of_planes
from effc.compiler.step import Step

__all__ = ["OPS", "Kind", "combine", "enter", "heard", "on_grid", "scan"]

State = tuple[Tensor, Tensor] | None
"""Keys and values [B, Hk, S, h] of earlier tokens; None before the first."""


@_op()
def add(a: Tensor, b: Tensor) -> Tensor:
    return a + b


@_op()
def gate(a: Tensor, b: Tensor) -> Tensor:
    """a * b, elementwise"""
    return a * b


@_op()
def scale(x: Tensor, *, factor: float) -> Tensor:
    """The factor is rounded to x's dtype first."""
    return x * x.new_tensor(factor)


@_op()
def softcap(x: Tensor, *, cap: float) -> Tensor:
    return _softcap(x, cap)


@_op()
def activate(x: Tensor, *, form: str) -> Tensor:
    return ACTIVATIONS[form](x)


@_op()
def cast_like(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype)


@_op()
def cast_to(x: Tensor, *, dtype: str) -> Tensor:
    return x.to(DTYPES[dtype])


@_op()
def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x [..., i], w [o, i] -> [..., o]"""
    return F.linear(x, w, b)


@_op()
def embed(ids: Tensor, w: Tensor) -> Tensor:
    """ids [B, T] -> rows of w [B, T, d]"""
    return F.embedding(ids, w)


@_op()
def rms_norm(x: Tensor, w: Tensor, b: Tensor | None = None, *, eps: float, offset: float) -> Tensor:
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    n = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = (n * (w.to(n.dtype) + offset)).to(x.dtype) if offset else n.to(x.dtype) * w
    return y if b is None else y + b


@_op()
def layer_norm(x: Tensor, w: Tensor, b: Tensor | None = None, *, eps: float, offset: float) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), w + offset if offset else w, b, eps)


@_op()
def dequantize(
    packed: Tensor, scales: Tensor, zeros: Tensor | None = None, *, bits: int, columns: int
) -> Tensor:
    """packed [R, bytes] uint8, scales [R or 1, G] -> float32 [R, columns]; see quant_linear for the layout"""
    middle = 1 << (bits - 1)
    q = _unpack(packed, bits, columns).to(torch.int16) - middle
    wide = q.float().view(q.shape[0], scales.shape[1], -1)
    if zeros is not None:
        codes = _unpack(zeros.unsqueeze(0), bits, scales.numel()).to(torch.int16) - middle
        wide = wide - codes.float().view(scales.shape).unsqueeze(-1)
    return (wide * scales.float().unsqueeze(-1)).view(q.shape)


@_op()
def sparse_low_rank(a: Tensor, b: Tensor, values: Tensor, places: Tensor, *, factor: float) -> Tensor:
    """a [r, i], b [o, r], values [n] at places [n] of the flattened matrix -> [o, i]"""
    return built(a, b, values, places, factor)


@_op()
def hashed(
    pool: Tensor,
    scales: Tensor,
    *,
    number: int,
    rows: int,
    columns: int,
    first: int,
    mapping: Any,
    chunk: int,
    seed: int,
) -> Tensor:
    """pool [m], scales [K] -> [rows, columns]: weights `first` and on of all that share the array"""
    h = _where(first, rows * columns, len(pool), mapping, chunk, seed).to(pool.device)
    return _laid(pool, scales[number], h, _signs(first, rows * columns, seed).to(pool.device), rows)


@_op()
def planes(signs: Tensor, scales: Tensor, *, columns: int) -> Tensor:
    """signs [P, o, bytes] uint8, scales [P, t, A, B] -> float32 [o, columns]; see planes.py for the layout"""
    return _of_planes(signs, scales, columns)


@_op()
def stack(w: Tensor, *, experts: int) -> Tensor:
    """w [E * o, i] -> [E, o, i]"""
    return w.view(experts, -1, w.shape[-1])


@_op()
def positions(step: Step) -> Tensor:
    return step.positions


@_op()
def token_types(step: Step, ids: Tensor) -> Tensor:
    return step.token_types if step.token_types is not None else torch.zeros_like(ids)


@_op()
def shift(index: Tensor, *, by: int) -> Tensor:
    return index + by


@_op()
def heads(x: Tensor, *, count: int) -> Tensor:
    """x [B, T, H h] -> [B, T, H, h]"""
    return x.view(*x.shape[:-1], count, x.shape[-1] // count)


@_op()
def heads_first(x: Tensor) -> Tensor:
    """x [B, T, H, h] -> [B, H, T, h]"""
    return x.transpose(1, 2)


@_op()
def join_heads(x: Tensor) -> Tensor:
    """x [B, H, T, h] -> [B, T, H h]"""
    return x.transpose(1, 2).flatten(2)


@_op()
def rope(x: Tensor, step: Step, *, parameters: Mapping[str, Any]) -> Tensor:
    """x [B, H, T, h], turned by the positions of its tokens"""
    return rotate(x, *tables(parameters, x.shape[-1], step, x.dtype))


@_op()
def visible(step: Step, x: Tensor, *, causal: bool, window: int | None) -> tuple[Tensor | None, bool]:
    """Who may see whom: a mask [B or 1, 1, T, S], or None with a word on whether causal order is all."""
    return step.mask(x.shape[1], causal, window)


@_op(gives=2)
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: tuple[Tensor | None, bool],
    past: State = None,
    *,
    scale: float,
    cap: float | None,
) -> tuple[Tensor, State]:
    """q [B, H, T, h] over past and new k, v -> y [B, H, T, h] and the longer past"""
    if past is not None:
        k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
    return _attend(q, k, v, seen[0], seen[1], scale, cap), (k, v)


@_op()
def flatten(x: Tensor) -> Tensor:
    """x [B, T, d] -> [N, d]"""
    return x.flatten(0, -2)


@_op()
def shape_like(y: Tensor, like: Tensor) -> Tensor:
    return y.view_as(like)


@_op()
def sigmoid(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


@_op()
def standardize(x: Tensor) -> Tensor:
    """x [N, d] -> mean 0 and deviation 1 over d"""
    return F.layer_norm(x, (x.shape[-1],))


@_op()
def tell(x: Tensor, step: Step, value: Tensor, *, side: str) -> Tensor:
    """x as it is; later blocks find the value under its name among the sides of the step"""
    step.sides[side] = value
    return x


@_op()
def told(step: Step, *, side: str) -> Tensor:
    """What an earlier block told of each token [B, T] -> [N, 1]"""
    return step.sides[side].reshape(-1, 1)


@_op()
def patches(pixels: Tensor, *, size: int) -> Tensor:
    """pixels [B, C, height, width] -> [B, patches, C size size]"""
    out: Tensor = F.unfold(pixels, size, stride=size).transpose(1, 2)
    return out


@_op()
def prepend(x: Tensor, row: Tensor) -> Tensor:
    """x [B, T, d], row [1, d] -> [B, 1 + T, d]"""
    return torch.cat((row.expand(x.shape[0], 1, -1), x), 1)
