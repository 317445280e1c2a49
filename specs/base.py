"""Spec: the frozen, closed, typed description of one thing that a recipe can ask for."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Spec(BaseModel):
    """Base of everything a recipe can name.

    Frozen, so a spec can be hashed into a key and can hold no state of a run.
    Closed (extra="forbid"), so a misspelt argument is an error and never a silence.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    kind: ClassVar[str]
    """The dotted name, e.g. "tie.recursive"."""


def name_by_path(cls: type[Spec], home: str) -> None:
    """Give a class of the package `home` its file's name as kind; classes elsewhere stay without.

    Raises:
        TypeError: it lacks a docstring, examples or the description of a field.
    """
    name = cls.__module__.removeprefix(home)
    if not cls.__module__.startswith(home) or name.startswith("_"):
        return
    cls.kind = name
    bare = [field for field, info in cls.model_fields.items() if not info.description]
    if bare or not cls.__dict__.get("__doc__") or not getattr(cls, "examples", ()):
        lacks = f"a description of {', '.join(bare)}" if bare else "a docstring or examples"
        raise TypeError(f"{cls.__module__}.{cls.__name__} lacks {lacks}")
