"""A tiny model with random weights, and sequences to run it with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effc.compiler.assemble import assemble
from effc.compiler.blocks import MLP, Attention, Embedding, Linear, MoE, Norm
from effc.compiler.method import Batch
from effc.compiler.model import Model, TokenizerFiles
from effc.compiler.sharing import tie

VOCAB, WIDTH, HIDDEN, LAYERS = 48, 32, 48, 6
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def blank(layers: int = LAYERS, tied: bool = True, experts: int = 0, dtype: str = "float32") -> Model:
    """A llama without weights, or a mixtral where `experts` are wanted."""

    def layer() -> dict[str, torch.nn.Module]:
        attention = Attention(width=WIDTH, heads=4, kv_heads=2, head_dim=8, rope=ROPE, dtype=dtype)
        block: dict[str, torch.nn.Module] = {
            "norm1": Norm(width=WIDTH, dtype=dtype),
            "attention": attention,
            "norm2": Norm(width=WIDTH, dtype=dtype),
        }
        if experts:
            return block | {"moe": MoE(width=WIDTH, hidden=HIDDEN, experts=experts, active=2, dtype=dtype)}
        return block | {"mlp": MLP(width=WIDTH, hidden=HIDDEN, dtype=dtype)}

    head = Linear(in_features=WIDTH, out_features=VOCAB, dtype=dtype)
    embedding = Embedding(vocab=VOCAB, width=WIDTH, dtype=dtype)
    gm = assemble(embedding, [layer() for _ in range(layers)], Norm(width=WIDTH, dtype=dtype), head)
    if tied:
        tie(gm, "head.weight", "embedding.weight")
    config = {"hidden_size": WIDTH, "model_type": "llama", "vocab_size": VOCAB}
    files = TokenizerFiles({"tokenizer.json": b"{}"})
    return Model(gm, architecture="llama", config=config, tokenizer=files)


def filled(model: Model, seed: int = 0) -> Model:
    """Random weights everywhere; gains near one."""
    dice = torch.Generator().manual_seed(seed)
    for name, tensor in model.tensors().items():
        noise = torch.randn(tensor.shape, generator=dice) * 0.15
        model.place(name, (noise + 1 if "norm" in name else noise).to(tensor.dtype))
    return model


def on_meta(model: Model) -> Model:
    """The same structure without weights."""
    clone = model.clone()
    for name, tensor in clone.tensors().items():
        clone.place(name, tensor.to("meta"))
    return clone


class Sequences:
    """Data in memory: random ids [N, T], of which every split sees all."""

    fingerprint = "random"
    vocabulary = "tiny"
    bytes_per_token = 3.0

    def __init__(self, model: Model, count: int = 16, length: int = 16, seed: int = 1) -> None:
        self.model = model
        self.ids = torch.randint(0, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))

    def size(self, split: str) -> int:
        return len(self.ids)

    def tokens(self, split: str) -> int:
        return self.ids.numel()

    def batch(self, split: str, indices: Sequence[int]) -> Batch:
        ids = self.ids[list(indices)]
        labels = torch.full_like(ids, -100)
        labels[:, :-1] = ids[:, 1:]
        return Batch(ids, labels, self.model.step(ids))


def outputs(model: Model, ids: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(ids)
    return out
