"""ModelSource: what `model base = load(...)` names; it gives a model whose weights are read when needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from effc.compiler.model import Model
from effc.specs.base import Spec, name_by_path

_HERE = "effc.runtime.models."


class ModelSource(Spec):
    """Base of every source of models."""

    examples: ClassVar[tuple[str, ...]]

    @classmethod
    def __pydantic_init_subclass__(cls, **_: object) -> None:
        name_by_path(cls, _HERE)

    def open(self, models: Mapping[str, Model], tiny: bool = False) -> Model:
        """The model; only configs and headers are read now.

        Args:
            models: those of the recipe so far, for a source that builds on another model.
            tiny: give a small random copy instead.

        Raises: E41x and E43x for files, E44x when there is no such model.
        """
        raise NotImplementedError

    def outline(self, models: Mapping[str, Model], tiny: bool = False) -> Model:
        """The structure alone, as a plan needs it; weights may still be missing."""
        return self.open(models, tiny)
