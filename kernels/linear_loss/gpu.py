"""linear_loss on a GPU, as the checks of kernels/gpu/check.py see it: the definition and its cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from effc.kernels.gpu.check import Case
from effc.kernels.linear_loss.emit_triton import emit
from effc.kernels.linear_loss.spec import LinearLossSpec

__all__ = ["cases", "emit", "launches", "parse", "reference"]


def parse(data: Mapping[str, Any]) -> LinearLossSpec:
    return LinearLossSpec.model_validate(data)


def reference(spec: LinearLossSpec, x: Tensor, w: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K], w [V, K], labels [T] -> loss [T] and lse [T], in the precision of x."""
    logits = x @ w.t()
    if spec.cap:
        logits = spec.cap * torch.tanh(logits / spec.cap)
    lse = logits.logsumexp(-1)
    hit = logits.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    target = (1 - spec.smoothing) * hit + spec.smoothing * logits.mean(-1)
    loss = lse - target + spec.z * lse.square()
    return torch.where(labels < 0, 0.0, loss), lse


def cases(spec: LinearLossSpec) -> Iterator[Case]:
    """More rows than a tile's, and labels of several chunks and shares; then one row, large logits."""
    rows, columns = spec.losses.rows, spec.losses.columns
    yield from _pair(spec, rows + 5, 2 * spec.of_weights.columns, spec.chunk + columns + 3, 1.0, seed=0)
    yield from _pair(spec, 1, spec.of_weights.columns, columns // 2 + 1, 300.0, seed=1)


def launches(spec: LinearLossSpec) -> Iterator[Case]:
    """Sizes that are multiples of 16, two chunks."""
    yield from _pair(spec, 128, 256, 2 * spec.chunk, 1.0, seed=2)


def _pair(spec: LinearLossSpec, t: int, k: int, v: int, large: float, seed: int) -> Iterator[Case]:
    dice = torch.Generator().manual_seed(seed)
    x = torch.randn(t, k, generator=dice).bfloat16()
    w = (torch.randn(v, k, generator=dice) * large / k**0.5).bfloat16()
    labels = torch.randint(0, v, (t,), generator=dice)
    labels[t // 2] = v - 1
    if t > 1:
        labels[1] = -100
    dloss = torch.rand(t, generator=dice) + 0.5
    leaves = [tensor.double().requires_grad_() for tensor in (x, w)]
    found = reference(spec, leaves[0], leaves[1], labels)
    given = {"x": x, "w": w, "labels": labels}

    def forward() -> dict[str, Tensor]:
        return {"loss": found[0].detach(), "lse": found[1].detach()}

    def backward() -> dict[str, Tensor]:
        dx, dw = torch.autograd.grad(found[0], leaves, dloss.double(), retain_graph=True)
        return {"dx": dx, "dw": dw}

    yield Case(f"forward {t} x {v}", given, forward, 4e-6, entry="forward")
    given = {"dloss": dloss, **given, "lse": found[1].detach().float()}
    # The gradients of the logits are bfloat16: half of its last digit for each.
    yield Case(f"backward {t} x {v}", given, backward, 2**-8, entry="backward")
