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
