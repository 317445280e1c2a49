"""A model from disk: a Hugging Face folder, the zoo, the local cache, an artefact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from effc.compiler.model import Model
from effc.runtime.artifact import is_artifact
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

        return self._opened(load(self.path, self.dtype, self.revision, weights=not tiny), tiny)

    def outline(self, models: Mapping[str, Model], tiny: bool = False) -> Model:
        """The same, also of a folder that holds no weights yet."""
        from effc.runtime.load import load

        return self._opened(load(self.path, self.dtype, self.revision, weights=False), tiny)

    def _opened(self, model: Model, tiny: bool) -> Model:
        """An artefact says itself whether it has learned something; what comes from elsewhere has."""
        found = smaller(model) if tiny else model
        learned = model.facts.get("learned", False) if is_artifact(Path(self.path)) else True
        found.facts |= {"learned": True} if learned else {}
        return found
