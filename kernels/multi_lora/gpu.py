"""multi_lora on a GPU, as the checks of kernels/gpu/check.py see it: its cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from effc.kernels.gpu.check import Case
from effc.kernels.multi_lora.emit_triton import emit
from effc.kernels.multi_lora.reference import example, reference
from effc.kernels.multi_lora.spec import MultiLoraGpuSpec

__all__ = ["cases", "emit", "launches", "parse"]


def parse(data: Mapping[str, Any]) -> MultiLoraGpuSpec:
    return MultiLoraGpuSpec.model_validate(data)


def cases(spec: MultiLoraGpuSpec) -> Iterator[Case]:
    """Ranks of 1, of no multiple of a step and the largest; more rows of an adapter than go together."""
    yield _case(spec, (spec.rank, 1, spec.block + 3), m=23, turns=3, n=spec.channels + 20)
    yield _case(spec, (8,), m=1, turns=1, n=48)
    yield _case(spec, (4, spec.rank), m=3 * spec.rows, turns=2, n=spec.channels)


def launches(spec: MultiLoraGpuSpec) -> Iterator[Case]:
    """Sizes that are multiples of 16."""
    yield _case(spec, (16, 64), m=32, turns=4, n=256)


def _case(spec: MultiLoraGpuSpec, ranks: tuple[int, ...], m: int, turns: int, n: int) -> Case:
    ranks = tuple(min(rank, spec.rank) for rank in ranks)
    x, adapters, index, base = example(ranks, m, turns * spec.columns, n, torch.bfloat16, seed=m)
    given: dict[str, Any] = {**adapters._asdict(), "x": x, "index": index, "base": base}

    def due() -> dict[str, Tensor]:
        return {"out": reference(x, adapters, index, base)}

    return Case(f"{m} rows, ranks {ranks}", given, due, tolerance=4e-5)
