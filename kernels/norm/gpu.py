"""norm on a GPU, as the checks of kernels/gpu/check.py see it: the definition and its cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from effc.kernels.byte_linear.layout import quantize_rows
from effc.kernels.gpu.check import Case
from effc.kernels.norm.emit_triton import NormGpuSpec, emit
from effc.kernels.norm.reference import reference
from effc.kernels.norm.spec import NormSpec

__all__ = ["cases", "emit", "launches", "parse"]


def parse(data: Mapping[str, Any]) -> NormGpuSpec:
    return NormGpuSpec.model_validate(data)


def cases(spec: NormGpuSpec) -> Iterator[Case]:
    """Widths that fill a block and that do not; one row, and more rows than programs."""
    for m, d in ((1, 128), (5, 192), (7, 384)):
        yield from _pair(spec, m, d, seed=m)


def launches(spec: NormGpuSpec) -> Iterator[Case]:
    """The width of a large model."""
    yield from _pair(spec, 3, 8192, seed=0)


def _pair(spec: NormGpuSpec, m: int, d: int, seed: int) -> Iterator[Case]:
    dice = torch.Generator().manual_seed(seed)
    x = (torch.randn(m, d, generator=dice) * 3 + 1).bfloat16()
    if m == 1:
        x *= 1e-3  # so small that eps shows
    gain = torch.randn(d, generator=dice).bfloat16()
    bias = torch.randn(d, generator=dice).bfloat16() if spec.bias else None
    dy = torch.randn(m, d, generator=dice).bfloat16()
    plain = NormSpec(form=spec.form, eps=spec.eps, offset=spec.offset, bias=spec.bias)
    leaves = [t.double().requires_grad_() for t in (x, gain, bias) if t is not None]
    y = reference(plain, *leaves)
    mean = x.double().mean(-1)
    centered = x.double() - (mean[:, None] if spec.form == "layer" else 0.0)
    inverse = torch.rsqrt(centered.square().mean(-1) + spec.eps)

    def forward() -> dict[str, Tensor]:
        due = {"y": y.detach(), "inverse": inverse}
        if spec.to:
            q, rows = quantize_rows(spec.to, due.pop("y"))
            due |= {"q": q.float(), "rows": rows}
            if spec.run:
                due["totals"] = due["q"].view(m, -1, spec.run).sum(-1).t()
        if spec.form == "layer":
            due["mean"] = mean
        if spec.run and not spec.to:
            due["sums"] = y.detach().view(m, -1, spec.run).sum(-1).t()
        return due

    def backward() -> dict[str, Tensor]:
        slopes = torch.autograd.grad(y, leaves, dy.double(), retain_graph=True)
        return dict(zip(("dx", "dgain", "dbias"), slopes, strict=False))

    shared = {"gain": gain} | ({"bias": bias} if bias is not None else {})
    yield Case(f"forward [{m}, {d}]", {"x": x, **shared}, forward, 2e-5, entry="forward")
    if spec.to:
        return
    given = {"dy": dy, "x": x, "gain": gain, "inverse": inverse.float()}
    if spec.form == "layer":
        given["mean"] = mean.float()
    yield Case(f"backward [{m}, {d}]", given, backward, 2e-5, entry="backward")
