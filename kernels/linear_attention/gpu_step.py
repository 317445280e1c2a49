"""linear_attention's step on a GPU: what of it is compiled."""

from __future__ import annotations

from collections.abc import Iterator

from effc.kernels.gpu.check import Case
from effc.kernels.linear_attention.gpu import cases, emit, parse, steps
from effc.kernels.linear_attention.spec_gpu import LinearAttentionGpuSpec

__all__ = ["cases", "emit", "launches", "parse"]


def launches(spec: LinearAttentionGpuSpec) -> Iterator[Case]:
    yield steps(spec, 16, seed=0)
