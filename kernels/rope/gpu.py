"""rope on a GPU, as the checks of kernels/gpu/check.py see it: the definition and its cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from effc.compiler.blocks.rope import rotate
from effc.kernels.gpu.check import Case
from effc.kernels.rope.emit_triton import RopeGpuSpec, emit

__all__ = ["cases", "emit", "launches", "parse", "reference"]


def parse(data: Mapping[str, Any]) -> RopeGpuSpec:
    return RopeGpuSpec.model_validate(data)


def reference(
    spec: RopeGpuSpec, qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [T, (H + 2 K) h], cos and sin [P, r / 2], positions [T] -> q [T, H, h], k and v [T, K, h]."""
    counts = (spec.heads, spec.kv_heads, spec.kv_heads)
    q, k, v = qkv.view(qkv.shape[0], -1, spec.head_dim).split(counts, 1)
    c, s = (t[positions.long()].repeat(1, 2)[:, None, :].to(qkv.dtype) for t in (cos, sin))
    return rotate(q, c, s), rotate(k, c, s), v


def cases(spec: RopeGpuSpec) -> Iterator[Case]:
    """One token and several, at positions out of order."""
    for tokens in (1, 7):
        yield from _pair(spec, tokens)


def launches(spec: RopeGpuSpec) -> Iterator[Case]:
    """Some tokens of a batch that decodes."""
    yield from _pair(spec, 4)


def _pair(spec: RopeGpuSpec, tokens: int) -> Iterator[Case]:
    dice = torch.Generator().manual_seed(tokens)
    qkv = torch.randn(tokens, spec.together * spec.head_dim, generator=dice).bfloat16()
    angle = torch.randn(50, spec.rotated // 2, generator=dice) * 3
    tables = {"cos": angle.cos(), "sin": angle.sin()}
    positions = torch.randperm(50, generator=dice)[:tokens].int()
    slots = torch.randperm(tokens, generator=dice).int()  # a cache of as many rows, all of them written
    leaf = qkv.double().requires_grad_()
    heads = reference(spec, leaf, tables["cos"].double(), tables["sin"].double(), positions)
    slopes = [torch.randn(y.shape, generator=dice).bfloat16() for y in heads]
    more = {**tables, "positions": positions} | ({"slots": slots} if spec.cache else {})

    def stored(y: Tensor) -> Tensor:
        return torch.empty_like(y).index_copy_(0, slots.long(), y) if spec.cache else y

    def forward() -> dict[str, Tensor]:
        q, k, v = (y.detach() for y in heads)
        return {"q": q, "k": stored(k), "v": stored(v)}

    def backward() -> dict[str, Tensor]:
        whole = torch.cat([y.flatten(1) for y in heads], 1)
        due = torch.cat([y.flatten(1) for y in slopes], 1).double()
        (found,) = torch.autograd.grad(whole, [leaf], due, retain_graph=True)
        return {"dqkv": found}

    dq, dk, dv = slopes[0], stored(slopes[1]), stored(slopes[2])
    yield Case(f"forward {tokens}", {"qkv": qkv, **more}, forward, 2e-6, entry="forward")
    given = {"dq": dq, "dk": dk, "dv": dv, **more}
    yield Case(f"backward {tokens}", given, backward, 2e-6, entry="backward")
