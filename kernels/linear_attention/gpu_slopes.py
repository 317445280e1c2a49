"""linear_attention's backward pass on a GPU: what of it is compiled."""

from __future__ import annotations

from collections.abc import Iterator

from effc.kernels.gpu.check import Case
from effc.kernels.linear_attention import gpu
from effc.kernels.linear_attention.gpu import cases, emit, parse
from effc.kernels.linear_attention.spec_gpu import LinearAttentionGpuSpec

__all__ = ["cases", "emit", "launches", "parse"]


def launches(spec: LinearAttentionGpuSpec) -> Iterator[Case]:
    yield gpu.slopes(spec)
