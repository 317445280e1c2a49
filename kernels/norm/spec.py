"""NormSpec: rows of x normalised, times a gain, plus a bias where there is one."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from effc.kernels.kernel import KernelSpec


class NormSpec(KernelSpec, frozen=True):
    """y = n(x) (offset + gain) + bias, as compiler/blocks/norm.py has it; all float32.

    rms: n(x) = x / sqrt(mean(x^2) + eps); layer: the mean is removed first. The width is an argument.
    """

    op: ClassVar[str] = "norm"
    version: ClassVar[int] = 1

    form: Literal["rms", "layer"] = "rms"
    eps: float = Field(gt=0)
    offset: float = 0.0
    """1 where a checkpoint stores the gain minus one."""
    bias: bool = False
