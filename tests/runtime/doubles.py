"""A llama of a few thousand weights, a tokenizer of a few hundred tokens, a journal in a dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from effc.compiler.assemble import assemble
from effc.compiler.blocks import MLP, Attention, Embedding, Linear, Norm
from effc.compiler.model import Model, TokenizerFiles
from effc.compiler.sharing import tie

TEXT = "def add(first, second):\n    return first + second\n\n" * 20
VOCABULARY = 300


def tokenizer_files() -> dict[str, bytes]:
    """A byte-level tokenizer whose documents open with token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 0)]
    )
    settings = b'{"bos_token": "<|end|>", "eos_token": "<|end|>"}'
    return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": settings}


def tiny(layers: int = 2, width: int = 32, seed: int = 0, dtype: torch.dtype = torch.float32) -> Model:
    """A random llama with a tied head."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    made = [
        {
            "norm1": Norm(width=width),
            "attention": Attention(width=width, heads=4, kv_heads=2, head_dim=width // 4, rope=rope),
            "norm2": Norm(width=width),
            "mlp": MLP(width=width, hidden=2 * width),
        }
        for _ in range(layers)
    ]
    head = Linear(in_features=width, out_features=VOCABULARY)
    gm = assemble(Embedding(vocab=VOCABULARY, width=width), made, Norm(width=width), head)
    tie(gm, "head.weight", "embedding.weight")
    config = {"hidden_size": width, "intermediate_size": 2 * width, "vocab_size": VOCABULARY}
    model = Model(gm, architecture="llama", config=config, tokenizer=TokenizerFiles(tokenizer_files()))
    random = torch.Generator().manual_seed(seed)
    for name, tensor in model.tensors().items():
        filled = torch.ones(tensor.shape)
        if tensor.dim() > 1:
            filled = torch.randn(tensor.shape, generator=random) * 0.05
        model.place(name, filled.to(dtype))
    return model


class Memory:
    """A journal that forgets with the process."""

    def __init__(self) -> None:
        self.units: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {}

    def done(self, unit: str) -> bool:
        return unit in self.units

    def save(self, unit: str, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
        self.units[unit] = ({k: v.clone() for k, v in tensors.items()}, dict(data))

    def read(self, unit: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.units[unit]
