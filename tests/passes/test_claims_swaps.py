"""Gates that free attention from the first token, and factors that let 64 layers without norms train."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from effc.compiler.assemble import Draft
from effc.compiler.blocks import MLP, Embedding, Linear
from effc.compiler.blocks.attention import Attention
from effc.compiler.method import Batch, Context
from effc.compiler.model import Model
from effc.compiler.step import Step
from effc.passes.adapt.full import Full
from effc.passes.arch.gated_attention import GatedAttentionSwap
from effc.passes.arch.residual_scale import ResidualScale
from effc.passes.tie._alike import rows_of_map
from effc.runtime.evaluate import loss
from effc.runtime.fit import fit
from effc.runtime.parts.train.optimizer.adamw import AdamW
from effc.runtime.stage import run_stage
from tests.claims import Measured

from .lab import DATA, LENGTH, VOCAB, fresh

pytestmark = pytest.mark.claim
SEEDS = (0, 1, 2)

# -- arch.gated_attention

CALLS = 3
"""The last tokens of the vocabulary: behind one of them stands what stood before it."""


class Recalls:
    """Behind the first token, 0 in every sequence, a chain of order one; a call is answered by the token
    before it. A head that answers calls has nothing to look for anywhere else.
    """

    vocabulary = "recalls"
    bytes_per_token = 1.0

    def __init__(self, seed: int) -> None:
        self.fingerprint = f"recalls {seed}"
        dice = torch.Generator().manual_seed(seed)
        plain = VOCAB - CALLS
        table = (2.5 * torch.randn(plain, plain, generator=dice)).softmax(-1)
        self.ids = {
            split: self._drawn(rows, table, dice) for split, rows in (("train", 6000), ("heldout", 200))
        }

    def _drawn(self, rows: int, table: Tensor, dice: torch.Generator) -> Tensor:
        """Ids [N, T]"""
        ids = torch.zeros(rows, LENGTH, dtype=torch.int64)
        ids[:, 1] = torch.randint(1, len(table), (rows,), generator=dice)
        for t in range(2, LENGTH):
            last, before = ids[:, t - 1], ids[:, t - 2]
            called = last >= len(table)
            drawn = torch.multinomial(table[last.where(~called, 0)], 1, generator=dice)[:, 0]
            call = torch.randint(len(table), VOCAB, (rows,), generator=dice)
            now = (torch.rand(rows, generator=dice) < 0.15) & ~called
            ids[:, t] = before.where(called, call.where(now, drawn))
        return ids

    def size(self, split: str) -> int:
        return len(self.ids[split])

    def tokens(self, split: str) -> int:
        return self.size(split) * (LENGTH - 1)

    def batch(self, split: str, indices: Sequence[int]) -> Batch:
        ids = self.ids[split][[i % self.size(split) for i in indices]]
        labels = torch.cat([ids[:, 1:], torch.full((len(ids), 1), -100)], 1)
        return Batch(ids, labels, Step(torch.arange(LENGTH).expand_as(ids)))


@cache
def recalls(seed: int) -> Recalls:
    return Recalls(seed)


def on_the_first(model: Model, batch: Batch) -> float:
    """Mean attention on token 0 over layers, heads and the queries behind it."""
    found: list[Tensor] = []

    def see(block: Any, args: Any) -> None:
        found.append(rows_of_map(block, *args, rows=LENGTH)[:, :, 1:, 0])

    handles = [u.register_forward_pre_hook(see) for _, u in model.units() if isinstance(u, Attention)]
    with torch.no_grad():
        model(batch.ids, step=batch.step)
    for handle in handles:
        handle.remove()
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("seed", SEEDS)
def test_gates_free_attention_from_the_first_token(seed: int, measured: Measured) -> None:
    method = Full(data=DATA, steps=500, batch=32, precision="fp32", optimizer=AdamW(lr=3e-3))
    base, text = fresh(seed), recalls(seed)
    gated = run_stage(GatedAttentionSwap(), [base], Context(seed)).model
    ends = [fit(method, model, Context(seed, {"data": text})).model for model in (base, gated)]
    plain, free = (on_the_first(model, text.batch("heldout", range(100))) for model in ends)
    about = "arch.gated_attention"
    claim = "mean attention on token 0 after 500 steps, over that without gates"
    measured(about, claim, free / plain, below=1.0)
    losses = [loss(model, text) for model in ends]
    measured(about, "the loss there, over that without gates", losses[1] / losses[0], below=1.01)


# -- arch.residual_scale

DEPTH, WIDTH = 64, 64
HALF = torch.finfo(torch.float16).max


def stream(seed: int, depth: int = DEPTH) -> Model:
    """x + W_2 relu(W_1 x), `depth` times, without norms; a branch keeps the variance of what it reads."""
    draft = Draft("test")
    x = draft.call("embedding", Embedding(vocab=VOCAB, width=WIDTH), draft.ids)
    for layer in range(depth):
        block = MLP(width=WIDTH, hidden=WIDTH, activation="relu", gated=False)
        x = draft.add(x, draft.call(f"layers.{layer}.mlp", block, x))
    model = Model(draft.done(draft.call("head", Linear(in_features=WIDTH, out_features=VOCAB), x)))
    dice = torch.Generator().manual_seed(seed)
    spread = {"embedding": 1.0, "up": (2 / WIDTH) ** 0.5, "down": WIDTH**-0.5, "head": WIDTH**-0.5}
    for name, tensor in model.tensors().items():
        drawn = torch.randn(tensor.shape, generator=dice)
        model.place(name, drawn * spread[name.split(".")[-2]])
    return model


def scaled(model: Model, rule: Any, seed: int) -> Model:
    return run_stage(ResidualScale(lambda_=rule, fold=False), [model], Context(seed)).model


def largest(model: Model) -> float:
    """The largest number that the head reads, in float64."""
    wide, seen = model.clone().to(torch.float64), []
    handle = wide.module("head").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        wide(torch.arange(VOCAB)[None])
    handle.remove()
    return float(seen[0].abs().max())


def ended(model: Model, seed: int) -> float:
    """Loss of a task without end after 150 steps of descent, in parts of chance: a token names another."""
    model = model.clone()
    for name, tensor in model.tensors().items():
        model.place(name, tensor.detach().clone())
    parameters = [p.requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    other = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(seed))
    ids = torch.arange(VOCAB)[None]
    worst = math.inf
    for _ in range(150):
        found = F.cross_entropy(model(ids)[0], other)
        worst = float(found.detach())
        if not math.isfinite(worst):
            return math.inf
        optimizer.zero_grad()
        found.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return worst / math.log(VOCAB)


@pytest.mark.parametrize("seed", SEEDS)
def test_64_layers_without_norms_overflow_or_do_not(seed: int, measured: Measured) -> None:
    base, about = stream(seed), "arch.residual_scale"
    words = "64 layers without norms: largest number of the stream, in parts of half precision's,"
    for rule, name in (("inv_sqrt_depth", "1 / sqrt(L)"), ("inv_depth", "1 / L")):
        measured(about, f"{words} {name}", largest(scaled(base, rule, seed)) / HALF, below=1.0)
    measured(about, f"{words} 1", largest(scaled(base, 1.0, seed)) / HALF, above=1.0)


@pytest.mark.parametrize("seed", SEEDS)
def test_64_layers_without_norms_train_or_do_not(seed: int, measured: Measured) -> None:
    base, about = stream(seed), "arch.residual_scale"
    words = "64 layers without norms: loss after 150 steps in parts of chance,"
    measured(about, f"{words} 1 / L", ended(scaled(base, "inv_depth", seed), seed), below=0.5)
    measured(about, f"{words} 1", ended(scaled(base, 1.0, seed), seed), above=1.0)
