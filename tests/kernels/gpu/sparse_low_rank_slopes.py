"""Slopes of a thin product plus scattered numbers as torch sees them, in a process that interprets."""

from __future__ import annotations

import json
from typing import Any

import torch

from effc.kernels.gpu.interpret import trusted
from effc.kernels.sparse_low_rank.call_gpu import linear
from effc.kernels.sparse_low_rank.layout import pack
from effc.kernels.sparse_low_rank.reference import reference
from effc.kernels.sparse_low_rank.spec import SparseLowRankSpec


def main() -> dict[str, float]:
    torch.manual_seed(0)
    places = torch.randperm(64 * 128)[:300]
    given = {"x": torch.randn(2, 9, 128), "a": torch.randn(10, 128) / 8, "b": torch.randn(64, 10) / 3}
    given = {name: t.bfloat16() for name, t in given.items()} | {"values": torch.randn(300).bfloat16()}
    wide = {name: t.double().requires_grad_() for name, t in given.items()}
    given = {name: t.requires_grad_() for name, t in given.items()}
    due = reference(wide["x"], wide["a"], wide["b"], wide["values"], places, 0.5)
    due.square().mean().backward()
    with trusted():
        spec = SparseLowRankSpec(rank=16, rows=16, step=16)
        support = pack(places, 64, 128)
        y = linear(spec, given["x"], given["a"], given["b"], given["values"], support, 0.5)
        y.float().square().mean().backward()
    found: dict[str, Any] = {name: (t.grad, wide[name].grad) for name, t in given.items()} | {
        "y": (y.detach(), due.detach())
    }
    return {n: float((a.double() - b).abs().max() / b.abs().max()) for n, (a, b) in found.items()}


if __name__ == "__main__":
    print(json.dumps(main()))
