"""linear_attention on a GPU, as the checks of kernels/gpu/check.py see it: its cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from effc.kernels.gpu.check import Case
from effc.kernels.linear_attention.emit_triton import emit
from effc.kernels.linear_attention.reference import reference
from effc.kernels.linear_attention.spec_gpu import CHUNK, LinearAttentionGpuSpec

__all__ = ["cases", "emit", "launches", "parse"]

OFF = 1e-2
"""of the largest result: what multiplies is rounded to bfloat16, weights of pairs and states too"""


def parse(data: Mapping[str, Any]) -> LinearAttentionGpuSpec:
    return LinearAttentionGpuSpec.model_validate(data)


def cases(spec: LinearAttentionGpuSpec) -> Iterator[Case]:
    """Sequences of one token, of less than a chunk, of more; gates that keep and that forget."""
    yield from _pair(spec, (1, 21, CHUNK + 9), "mild", seed=0)
    yield from _pair(spec, (CHUNK,), "harsh", seed=1, past=False)
    yield from _pair(spec, (CHUNK + 3,), "open", seed=2)
    yield steps(spec, 3, seed=3)


def launches(spec: LinearAttentionGpuSpec) -> Iterator[Case]:
    """The forward pass; the others are in gpu_slopes.py and gpu_step.py."""
    yield next(_pair(spec, (96, 160), "mild", seed=0))


def slopes(spec: LinearAttentionGpuSpec) -> Case:
    """The backward pass of whole and of part chunks."""
    return list(_pair(spec, (96, 160), "mild", seed=0))[1]


def gates(kind: str, shape: tuple[int, ...], dice: torch.Generator) -> Tensor:
    """Log gates: about 1 / 16 of a sigmoid's, -50 of all but few, or 0 and nothing and -inf mixed."""
    mild = torch.nn.functional.logsigmoid(torch.randn(shape, generator=dice)) / 16
    draw = torch.rand(shape, generator=dice)
    if kind == "harsh":
        return torch.where(draw < 0.8, torch.tensor(-50.0), mild)
    if kind == "open":
        return torch.where(draw < 0.02, torch.tensor(-torch.inf), 0.0)
    return torch.where(draw < 0.1, mild * 40, mild)


def _pair(
    spec: LinearAttentionGpuSpec, lengths: tuple[int, ...], kind: str, seed: int, past: bool = True
) -> Iterator[Case]:
    dice, t = torch.Generator().manual_seed(seed), sum(lengths)
    starts = torch.tensor([0, *lengths]).cumsum(0).int()

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=dice)

    q, k = (draw(t, heads, spec.key_dim).bfloat16() for heads in (spec.heads, spec.kv_heads))
    v, do = (draw(t, heads, spec.value_dim).bfloat16() for heads in (spec.kv_heads, spec.heads))
    g = gates(kind, (t, spec.kv_heads, spec.gates), dice)
    shape = (len(lengths), spec.kv_heads, spec.key_dim, spec.value_dim)
    first, dlast = draw(*shape), draw(*shape) if past else None
    leaves = [x.double().requires_grad_() for x in (q, k, v, g, first * past)]
    wide_q, wide_k, wide_v, wide_g, wide_past = leaves
    out, last = reference(wide_q, wide_k, wide_v, wide_g, starts, wide_past, scale=spec.scale)

    def fore() -> dict[str, Tensor]:
        return {"out": out.detach(), "last": last.detach()}

    def back() -> dict[str, Tensor]:
        made, slopes = (
            ([out], [do.double()]) if dlast is None else ([out, last], [do.double(), dlast.double()])
        )
        found = torch.autograd.grad(made, leaves, slopes, retain_graph=True)
        return dict(zip(("dq", "dk", "dv", "dg", "dpast"), found, strict=True))

    given: dict[str, Any] = {
        "q": q,
        "k": k,
        "v": v,
        "g": g,
        "starts": starts,
        "past": first if past else None,
    }
    yield Case(f"forward {kind} {lengths}", given, fore, OFF, entry="forward")
    given |= {"dout": do, "dlast": dlast}
    yield Case(f"backward {kind} {lengths}", given, back, OFF, entry="backward")


def steps(spec: LinearAttentionGpuSpec, rows: int, seed: int) -> Case:
    """One token of each of `rows` sequences."""
    dice = torch.Generator().manual_seed(seed)
    q, k = (
        torch.randn(rows, n, spec.key_dim, generator=dice).bfloat16() for n in (spec.heads, spec.kv_heads)
    )
    v = torch.randn(rows, spec.kv_heads, spec.value_dim, generator=dice).bfloat16()
    g = gates("open", (rows, spec.kv_heads, spec.gates), dice) - 0.25
    past = torch.randn(rows, spec.kv_heads, spec.key_dim, spec.value_dim, generator=dice)

    def due() -> dict[str, Tensor]:
        a, b, c, d = (x.double() for x in (q, k, v, g))
        out, after = reference(a, b, c, d, torch.arange(rows + 1), past.double(), scale=spec.scale)
        return {"out": out, "after": after}

    return Case(f"step of {rows}", {"q": q, "k": k, "v": v, "g": g, "past": past}, due, 2e-6, entry="step")
