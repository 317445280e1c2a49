"""Small models for the tests of the store and of runs."""

from __future__ import annotations

import torch

from effc.compiler.assemble import assemble
from effc.compiler.blocks import MLP, Attention, Embedding, Linear, Norm
from effc.compiler.model import Model, TokenizerFiles
from effc.compiler.sharing import tie


def decoder(layers: int = 2, seed: int = 0) -> Model:
    """A random decoder of a few thousand weights, head tied to the embedding."""
    width, vocab = 16, 40

    def layer() -> dict[str, torch.nn.Module]:
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        return {
            "norm1": Norm(width=width),
            "attention": Attention(width=width, heads=2, kv_heads=2, head_dim=8, rope=rope),
            "norm2": Norm(width=width),
            "mlp": MLP(width=width, hidden=24),
        }

    embedding, head = Embedding(vocab=vocab, width=width), Linear(in_features=width, out_features=vocab)
    gm = assemble(embedding, [layer() for _ in range(layers)], Norm(width=width), head)
    tie(gm, "head.weight", "embedding.weight")
    files = TokenizerFiles({"tokenizer.json": b"{}"})
    model = Model(gm, architecture="llama", config={"model_type": "llama"}, tokenizer=files)
    draw = torch.Generator().manual_seed(seed)
    for name, tensor in model.tensors().items():
        model.place(name, torch.randn(tensor.shape, generator=draw) * 0.2)
    return model


def same(a: Model, b: Model) -> bool:
    """Whether two models hold the same bits under the same names."""
    a, b = a.clone().materialize(), b.clone().materialize()
    ours, theirs = a.tensors(), b.tensors()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
