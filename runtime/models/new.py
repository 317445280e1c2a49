"""A fresh model: an architecture, sizes, a tokenizer, random weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from effc.compiler.architecture import architecture
from effc.compiler.importer import build, tokenizer_files
from effc.compiler.method import Slot
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.weights import LazyTensor
from effc.runtime.data._vocabulary import Vocabulary
from effc.runtime.models._blocks import BlockPart
from effc.runtime.models._source import ModelSource
from effc.runtime.smaller import smaller
from effc.specs.diagnostic import Diagnostic, EffcError
from effc.specs.units import Count

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_DEEP = (".o.weight", ".down.weight")
"""Weights that write into the residual stream; they begin smaller, the more layers add up."""


class New(ModelSource):
    """A decoder that has learned nothing yet: normal weights of deviation 0.02, gains of one, a tied head.

    Weights that write into the residual stream begin smaller by sqrt(2 layers). Train it with adapt.full.
    Other blocks in the family's place fill `attention`, `norm` and `residual`; exports then are artefacts.
    """

    examples: ClassVar[tuple[str, ...]] = (
        'new(llama, tokenizer = "specs/zoo/pylm", layers = 2, width = 64, hidden = 128, heads = 4)',
        'new(qwen3, tokenizer = "specs/zoo/pylm", attention = gated_attention(), norm = layer_norm())',
    )

    architecture: Literal["llama", "mistral", "qwen2", "qwen3"] = Field(description="family of the blocks")
    tokenizer: str = Field(min_length=1, description="folder that holds tokenizer.json and its companions")
    layers: Count = Field(default=8, ge=1, le=1000, description="how many layers")
    width: Count = Field(default=256, ge=8, le=65536, description="channels of the residual stream")
    hidden: Count = Field(default=896, ge=8, le=262144, description="channels inside the mlp")
    heads: Count = Field(default=4, ge=1, le=1024, description="query heads")
    kv_heads: Count | None = Field(
        default=None, ge=1, le=1024, description="key and value heads; none: as many as heads"
    )
    positions: Count = Field(default=512, ge=8, le=1_000_000, description="longest sequence")
    attention: Annotated[BlockPart | None, Slot("arch.attention")] = Field(
        default=None, description="attention of another form, e.g. gated_attention(); none: the family's"
    )
    norm: Annotated[BlockPart | None, Slot("arch.norm")] = Field(
        default=None, description="norms of another form, e.g. layer_norm(); none: the family's"
    )
    residual: Annotated[BlockPart | None, Slot("arch.residual")] = Field(
        default=None, description="branches with a factor, e.g. residual_scale(); none: as they are"
    )
    dtype: Literal["bf16", "fp32"] = Field(default="bf16", description="how weights are stored")
    seed: int = Field(default=0, ge=0, description="what the weights are drawn from")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads must divide width: {self.width} / {self.heads}")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"kv_heads must divide heads: {self.heads} / {self.kv_heads}")
        return self

    def open(self, models: Mapping[str, Model], tiny: bool = False) -> Model:
        """The model; its weights are drawn when they are read, each from the seed and its own name.

        Raises: E625 when the folder holds no tokenizer that can be read.
        """
        found = tokenizer_files(Path(self.tokenizer)) if Path(self.tokenizer).is_dir() else None
        if found is None:
            note = f"looked for tokenizer.json in `{self.tokenizer}`"
            raise EffcError(
                Diagnostic(
                    "E625",
                    "there is no tokenizer for the new model",
                    notes=(note,),
                    help="give the folder of a model that has one",
                    about="tokenizer",
                )
            )
        vocabulary = Vocabulary.of(found.files)
        family = architecture(self.architecture)
        model = build(family, self._config(vocabulary, family.classes[0]), _DTYPES[self.dtype])
        if parts := [part for part in (self.attention, self.norm, self.residual) if part is not None]:
            rw = Rewriter(model, "new")
            for part in parts:
                part.put(rw)
            model = rw.done()
        model.tokenizer = found
        model.weights = {name: self._lazy(name, tensor) for name, tensor in model.tensors().items()}
        return smaller(model) if tiny else model

    def _config(self, vocabulary: Vocabulary, written: str) -> dict[str, Any]:
        """config.json as transformers writes it."""
        ids = {
            f"{word}_token_id": vocabulary.tokenizer.token_to_id(token)
            for word in ("bos", "eos", "pad")
            if (token := vocabulary.token(f"{word}_token")) is not None
        }
        return {
            "architectures": [written],
            "attention_bias": False,
            "attention_dropout": 0.0,
            **ids,
            "dtype": str(_DTYPES[self.dtype]).removeprefix("torch."),
            "head_dim": self.width // self.heads,
            "hidden_act": "silu",
            "hidden_size": self.width,
            "initializer_range": 0.02,
            "intermediate_size": self.hidden,
            "max_position_embeddings": self.positions,
            "mlp_bias": False,
            "model_type": self.architecture,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads or self.heads,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "tie_word_embeddings": True,
            "use_cache": True,
            "vocab_size": vocabulary.tokenizer.get_vocab_size(),
        }

    def _lazy(self, name: str, tensor: Tensor) -> LazyTensor:
        shape, dtype = tuple(tensor.shape), tensor.dtype
        return LazyTensor(shape, dtype, partial(_drawn, name, shape, dtype, self.layers, self.seed))


def _drawn(name: str, shape: tuple[int, ...], dtype: torch.dtype, layers: int, seed: int) -> Tensor:
    """First values of one tensor."""
    if len(shape) == 1:
        return torch.zeros(shape, dtype=dtype) if name.endswith(".bias") else torch.ones(shape, dtype=dtype)
    digest = sha256(f"{seed}/{name}".encode()).digest()
    random = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    deviation = 0.02 / math.sqrt(2 * layers) if name.endswith(_DEEP) else 0.02
    return (torch.randn(shape, generator=random) * deviation).to(dtype)
