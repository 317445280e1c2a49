"""Models whose tokens leave or skip layers at different depths, and ways to run them, for tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from effc.compiler.method import Batch
from effc.compiler.model import Model
from effc.compiler.ops_adaptive import LEFT
from effc.compiler.rewrite import Rewriter
from effc.compiler.step import Cache
from effc.passes.adaptive._exits import exits_in
from effc.passes.adaptive.early_exit import EarlyExit
from effc.specs.recipe import Ref
from tests.compiler.conftest import DECODERS, fill

from .tiny_models import Sequences


class Again(Sequences):
    """Few sequences, seen over and over."""

    def batch(self, split: str, indices: Sequence[int]) -> Batch:
        return super().batch(split, [i % len(self.ids) for i in indices])


DENSE = [name for name in DECODERS if name != "mixtral"]
"""Families of decoders whose layers can be skipped."""


def deep(family: str, layers: int = 6) -> Model:
    """A decoder of a family with more layers than its test model has."""
    model = fill(DECODERS[family]())
    rw = Rewriter(model)
    rw.arrange_layers([i % model.layers for i in range(layers)])
    return fill(rw.done(), seed=3)


def exiting(model: Model, sharp: float = 40.0, every: int = 2, heads: str = "own") -> Model:
    """The model with exits at which about half of the tokens that come leaves."""
    method = EarlyExit.model_validate(
        {"data": Ref("code"), "steps": 1, "every": every, "heads": heads, "warmup": 0}
    )
    rw = Rewriter(model, method.kind)
    method.outline(rw, [])
    method.begin(rw, 0)
    out = rw.done()
    ids = torch.randint(0, 48, (3, 12), generator=torch.Generator().manual_seed(5))
    for unit in exits_in(out).values():
        step, seen = out.step(ids), {}
        handle = unit.register_forward_pre_hook(lambda _, args, seen=seen: seen.__setitem__("x", args[0]))
        with torch.no_grad():
            out(ids, step=step)
            handle.remove()
            left = step.sides[LEFT]
            come = (left < 0) | (left >= unit.number)
            sure = unit.logits(seen["x"][come]).float().softmax(-1).amax(-1)
        edge = float(sure.quantile(0.55))
        weight = torch.zeros(1, 4)
        weight[0, 0] = sharp / max(edge, 1e-3)
        unit.gate.weight = nn.Parameter(weight, requires_grad=False)
        unit.gate.bias = nn.Parameter(torch.tensor([-sharp]), requires_grad=False)
    return out


def stepped(model: Model, ids: Tensor, first: int = 1, mask: Tensor | None = None) -> tuple[Tensor, Cache]:
    """Logits [B, T, V] of a prompt of `first` tokens, then one token at a time; and the cache behind them."""
    cache = Cache(ids.shape[1])
    parts = []
    with torch.no_grad():
        for start, end in [(0, first), *((t, t + 1) for t in range(first, ids.shape[1]))]:
            held = None if mask is None else mask[:, :end]
            parts.append(model(ids[:, start:end], step=model.step(ids[:, start:end], held, cache)))
    return torch.cat(parts, 1), cache
