"""A bed to measure tuning and merging on: a decoder that knows one language of chains, and more languages.

The model has 2 layers 64 wide and reads 48 tokens. A language is a Markov chain of order two; another one
keeps a fifth of the contexts of the first and draws the others anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from effc.compiler.assemble import assemble
from effc.compiler.blocks import MLP, Attention, Embedding, Linear, Norm
from effc.compiler.method import Batch, Context
from effc.compiler.model import Model, TokenizerFiles
from effc.compiler.shapes import Train
from effc.compiler.step import Step
from effc.passes.adapt.full import Full
from effc.runtime.evaluate import loss
from effc.runtime.fit import fit
from effc.runtime.parts.train.optimizer.adamw import AdamW
from effc.specs.recipe import Ref

VOCAB, WIDTH, LENGTH = 48, 64, 32
KEPT = 0.2
"""Share of contexts that two languages have in common."""
DATA = Ref("text")


@cache
def language(name: str, seed: int) -> Tensor:
    """The probability of each token behind each pair [V, V, V]."""
    dice = torch.Generator().manual_seed(1000 * seed + sum(map(ord, name)))
    rows = (3.0 * torch.randn(VOCAB, VOCAB, VOCAB, generator=dice)).softmax(-1)
    if name == "A":
        return rows
    common = torch.rand(VOCAB, VOCAB, 1, generator=dice) < KEPT
    return torch.where(common, language("A", seed), rows)


def chains(name: str, rows: int, seed: int, draw: int) -> Tensor:
    """Ids [N, T]"""
    table, dice = language(name, seed), torch.Generator().manual_seed(draw)
    ids = torch.randint(0, VOCAB, (rows, LENGTH), generator=dice)
    for t in range(2, LENGTH):
        ids[:, t] = torch.multinomial(table[ids[:, t - 2], ids[:, t - 1]], 1, generator=dice)[:, 0]
    return ids


class Chains:
    """Sequences of one language, held out ones apart."""

    fingerprint = vocabulary = "chains"
    bytes_per_token = 1.0

    def __init__(self, name: str, seed: int, train: int = 600) -> None:
        self.ids = {
            "train": chains(name, train, seed, draw=seed),
            "valid": chains(name, 100, seed, draw=seed + 10_000),
            "heldout": chains(name, 300, seed, draw=seed + 20_000),
        }

    def size(self, split: str) -> int:
        return len(self.ids[split])

    def tokens(self, split: str) -> int:
        return self.size(split) * (LENGTH - 1)

    def batch(self, split: str, indices: Sequence[int]) -> Batch:
        ids = self.ids[split][[i % self.size(split) for i in indices]]
        labels = torch.cat([ids[:, 1:], torch.full((len(ids), 1), -100)], 1)
        return Batch(ids, labels, Step(torch.arange(LENGTH).expand_as(ids)))


@cache
def data(name: str, seed: int, train: int = 600) -> Chains:
    return Chains(name, seed, train)


def fresh(seed: int, layers: int = 2, width: int = WIDTH) -> Model:
    """Random weights, in heads of 16."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    heads = width // 16
    rows = [
        {
            "norm1": Norm(width=width),
            "attention": Attention(width=width, heads=heads, kv_heads=heads, head_dim=16, rope=rope),
            "norm2": Norm(width=width),
            "mlp": MLP(width=width, hidden=4 * width),
        }
        for _ in range(layers)
    ]
    head = Linear(in_features=width, out_features=VOCAB)
    gm = assemble(Embedding(vocab=VOCAB, width=width), rows, Norm(width=width), head)
    config = {"hidden_size": width, "intermediate_size": 4 * width, "vocab_size": VOCAB}
    model = Model(
        gm, architecture="llama", config=config, tokenizer=TokenizerFiles({"tokenizer.json": b"{}"})
    )
    dice = torch.Generator().manual_seed(seed)
    for name, tensor in model.tensors().items():
        drawn = torch.randn(tensor.shape, generator=dice) * 0.08
        model.place(name, drawn if tensor.dim() > 1 else torch.ones(tensor.shape))
    return model


def tuned(method: Train, model: Model, name: str, seed: int, draw: int = 0) -> Model:
    """The model after a training stage on 600 sequences of a language."""
    return fit(method, model, Context(seed + 100 * draw, {"data": data(name, seed)})).model


def heldout(model: Model, name: str, seed: int, split: str = "heldout", train: int = 600) -> float:
    return loss(model, data(name, seed, train), split)


@cache
def base(seed: int) -> Model:
    """Knows language A."""
    method = Full(data=DATA, steps=700, batch=32, precision="fp32", optimizer=AdamW(lr=3e-3))
    return fit(method, fresh(seed), Context(seed, {"data": data("A", seed, 8000)})).model
