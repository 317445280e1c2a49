"""A PEFT adapter on a model: `model tuned = adapter("out/lora", on = base)`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from effc.compiler.method import ModelRef
from effc.compiler.model import Model
from effc.runtime.adapter import put_on, sketched_on
from effc.runtime.models._source import ModelSource


class Adapter(ModelSource):
    """A LoRA in the folder that peft's `save_pretrained` writes, beside the weights of a model.

    `adapt.fold` adds it to them; `peft(...)` exports it.
    """

    examples: ClassVar[tuple[str, ...]] = ('adapter("out/lora", on = base)',)

    path: str = Field(min_length=1, description="folder with adapter_config.json and its safetensors")
    on: ModelRef = Field(description="the model it was trained on")

    def open(self, models: Mapping[str, Model], tiny: bool = False) -> Model:
        """The model with the adapter. Raises: E414-E417 for files, E460-E462 for the adapter."""
        put = sketched_on if tiny else put_on
        return put(Path(self.path), models[self.on.name])
