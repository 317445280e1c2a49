"""A network that learns from its sequence copies across a distance that no window spans."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
import torch

from effc.compiler.assemble import assemble
from effc.compiler.blocks import MLP, Attention, Embedding, Linear, Norm
from effc.compiler.method import Batch, Context
from effc.compiler.model import Model
from effc.compiler.step import Step
from effc.passes.adapt.full import Full
from effc.passes.linearize.lact import LaCT
from effc.runtime.evaluate import loss
from effc.runtime.fit import fit
from effc.runtime.parts.train.optimizer.adamw import AdamW
from effc.runtime.stage import run_stage
from tests.claims import Measured

from .lab import DATA

pytestmark = pytest.mark.claim
SEEDS = (0, 1, 2)
SYMBOLS, SPAN, WINDOW, WIDTH = 8, 32, 16, 64
"""Tokens are drawn at random and then repeated: each is asked for `SPAN` places behind where it stood, and
two layers of `WINDOW` tokens see 30 back.
"""
STEPS = 300


class Copies:
    """Random sequences told twice; the second telling is asked for."""

    vocabulary = fingerprint = "copies"
    bytes_per_token = 1.0

    def __init__(self, seed: int) -> None:
        dice = torch.Generator().manual_seed(seed)
        self.ids = {
            split: torch.randint(0, SYMBOLS, (rows, SPAN), generator=dice).repeat(1, 2)
            for split, rows in (("train", 20_000), ("heldout", 200))
        }

    def size(self, split: str) -> int:
        return len(self.ids[split])

    def tokens(self, split: str) -> int:
        return self.size(split) * SPAN

    def batch(self, split: str, indices: Sequence[int]) -> Batch:
        ids = self.ids[split][[i % self.size(split) for i in indices]]
        labels = torch.full_like(ids, -100)
        labels[:, SPAN - 1 : -1] = ids[:, SPAN:]
        return Batch(ids, labels, Step(torch.arange(2 * SPAN).expand_as(ids)))


@cache
def copies(seed: int) -> Copies:
    return Copies(seed)


def windowed(seed: int) -> Model:
    """Two layers of attention over a window, with learned positions."""
    layers = [
        {
            "norm1": Norm(width=WIDTH),
            "attention": Attention(width=WIDTH, heads=2, kv_heads=2, head_dim=WIDTH // 2, window=WINDOW),
            "norm2": Norm(width=WIDTH),
            "mlp": MLP(width=WIDTH, hidden=2 * WIDTH),
        }
        for _ in range(2)
    ]
    embedding = Embedding(vocab=SYMBOLS, width=WIDTH, positions=2 * SPAN)
    head = Linear(in_features=WIDTH, out_features=SYMBOLS)
    model = Model(assemble(embedding, layers, Norm(width=WIDTH), head))
    dice = torch.Generator().manual_seed(seed)
    for name, tensor in model.tensors().items():
        drawn = torch.randn(tensor.shape, generator=dice) / WIDTH**0.5
        model.place(name, drawn if tensor.dim() > 1 else torch.ones(tensor.shape))
    return model


def ended(model: Model, seed: int) -> float:
    method = Full(data=DATA, steps=STEPS, batch=16, precision="fp32", optimizer=AdamW(lr=3e-3))
    return loss(fit(method, model, Context(seed, {"data": copies(seed)})).model, copies(seed))


@pytest.mark.parametrize("seed", SEEDS)
def test_fast_weights_copy_what_no_window_sees(seed: int, measured: Measured) -> None:
    base = windowed(seed)
    method = LaCT(heads=1, chunk=WINDOW, window=WINDOW, low_rank=0, opt="momentum", lr0=0.5)
    learner = run_stage(method, [base], Context(seed)).model
    mine, alone = ended(learner, seed), ended(base, seed)
    claim = f"copying 32 tokens back after {STEPS} steps: loss over that of two windows of 16"
    measured("linearize.lact", claim, mine / alone, below=0.9)
