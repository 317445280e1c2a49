"""Case: one call of a C kernel and what it is to give, as kernels/cpu/check.py calls it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Inside:
    """An argument that points into another one."""

    whole: str
    at: int
    """numbers from its first"""


Argument = Tensor | Inside | int | None


@dataclass(frozen=True, slots=True)
class Case:
    """One call of a kernel's entry, and what it is to give."""

    label: str
    given: Mapping[str, Argument]
    """All arguments in the order of the entry's fields. A kernel gets copies."""
    due: Mapping[str, Tensor]
    """Results by the name of their argument."""
    tolerance: float
    """of the largest magnitude that is due"""
    scratch: Sequence[str] = ()
    """Arguments whose content before the call means nothing."""
