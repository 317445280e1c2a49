"""Slopes of linear attention as torch sees them, in a process that interprets: how far each is off."""

from __future__ import annotations

import json

import torch

from effc.kernels.gpu.interpret import trusted
from effc.kernels.linear_attention.call_gpu import attend, step
from effc.kernels.linear_attention.reference import reference
from effc.kernels.linear_attention.spec_gpu import LinearAttentionGpuSpec


def off(found: torch.Tensor, due: torch.Tensor) -> float:
    return float((found.double() - due).abs().max() / due.abs().max())


def main() -> dict[str, float]:
    torch.manual_seed(0)
    spec = LinearAttentionGpuSpec(heads=2, kv_heads=1, key_dim=64, value_dim=64, scale=0.125)
    starts = torch.tensor([0, 5, 40], dtype=torch.int32)
    shapes = {"q": 2, "k": 1, "v": 1}
    given = {name: torch.randn(40, heads, 64).bfloat16().requires_grad_() for name, heads in shapes.items()}
    given["g"] = (-torch.rand(40, 1, 64)).requires_grad_()
    given["past"] = torch.randn(2, 1, 64, 64).requires_grad_()
    wide = {name: t.detach().double().requires_grad_() for name, t in given.items()}
    due, after = reference(*(wide[n] for n in "qkvg"), starts, wide["past"], scale=spec.scale)
    (due.square().mean() + after.mean()).backward()
    with trusted():
        out, last = attend(spec, *(given[n] for n in "qkvg"), given["past"], starts)
        (out.float().square().mean() + last.mean()).backward()
        state = last.detach().clone()
        one = [given[n].detach()[:2] for n in "qkvg"]
        y = step(spec, *one, state)
    found = {name: off(t.grad, wide[name].grad) for name, t in given.items()}
    double = [t.double() for t in one]
    again, final = reference(*double, torch.arange(3), last.detach().double(), scale=spec.scale)
    return {**found, "out": off(out.detach(), due.detach()), "step": max(off(y, again), off(state, final))}


if __name__ == "__main__":
    print(json.dumps(main()))
