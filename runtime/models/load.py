"""A model from disk: a Hugging Face folder, the zoo, the local cache, an artefact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from effc.compiler.model import Model
from effc.runtime.models._source import ModelSource
from effc.runtime.smaller import smaller


class Load(ModelSource):
    """Open a model where it lies. Nothing is downloaded and no code of the model's own is run.

    `path` is a folder in Hugging Face layout, an artefact, `zoo:NAME`, or `hf:org/name` from the local cache.
    Tokenizer, special tokens, generation settings and chat template come along.
    """

    examples: ClassVar[tuple[str, ...]] = ('load("zoo:pylm")',)

    path: str = Field(min_length=1, description="folder, artefact, zoo:NAME or hf:org/name")
    revision: str | None = Field(default=None, description="branch, tag or commit of an hf: model")
    dtype: Literal["bf16", "fp16", "fp32"] | None = Field(
        default=None, description="dtype of weights; none: as stored"
    )

    def open(self, models: Mapping[str, Model], tiny: bool = False) -> Model:
        """The model, its weights unread. Raises: see effc.runtime.load.load."""
        from effc.runtime.load import load

        model = load(self.path, self.dtype, self.revision, weights=not tiny)
        return smaller(model) if tiny else model

    def outline(self, models: Mapping[str, Model], tiny: bool = False) -> Model:
        """The same, also of a folder that holds no weights yet."""
        from effc.runtime.load import load

        model = load(self.path, self.dtype, self.revision, weights=False)
        return smaller(model) if tiny else model
