"""Launching: collects the launches of one program of a GPU, and gives them the model's tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from effc.compiler.model import Model
from effc.kernels.gpu.caches import Caches
from effc.kernels.gpu.launches import Attended, Launch, Room
from effc.kernels.kernel import KernelSpec
from effc.kernels.linear_attention.spec_gpu import LinearAttentionGpuSpec
from effc.passes.lower._jobs import Job, Jobs

Rows = Literal["bfloat16", "int8", "float8"]
"""What the rows of x become before a linear layer; bytes have a scale to each row, made on the way."""


class Product(NamedTuple):
    """A matrix times rows: the launch's name, what runs, its kernels, and why no faster one."""

    op: str
    run: Callable[..., Tensor]
    """room, the value x, out [M, N] or None, operands of the epilogue by name -> y [M, N] bfloat16"""
    specs: tuple[KernelSpec, ...] = ()
    why: str = ""


@dataclass(slots=True)
class Launching:
    """What the launches of jobs are written into."""

    model: Model
    jobs: Jobs
    device: torch.device
    rows: Rows = "bfloat16"
    launches: list[Launch] = field(default_factory=list)
    attentions: list[Attended] = field(default_factory=list)
    recurrences: list[LinearAttentionGpuSpec] = field(default_factory=list)
    angles: dict[str, Callable[[int], tuple[Tensor, Tensor]]] = field(default_factory=dict)
    """By rotary settings, so that layers share their tables."""
    summed: set[int] = field(default_factory=set)
    """Values whose sums over runs of columns the norm that makes them gives."""
    byted: set[tuple[int, int]] = field(default_factory=set)
    """Values that a launch so far has made bytes of, and the columns of their totals (0: none)."""

    @property
    def empty(self) -> bool:
        """Whether this is a table of launches alone, without tensors."""
        return self.device.type == "meta"

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor of the model as a kernel reads it."""
        return self.model.tensors()[name].detach().to(self.device, dtype).contiguous()

    def made(self, make: Callable[[], Mapping[str, Tensor | None]]) -> dict[str, Tensor]:
        """Tensors as a kernel reads them, on the device; none where there are no weights."""
        if self.empty:
            return {}
        return {name: t.to(self.device) for name, t in make().items() if t is not None}

    def add(
        self, op: str, job: Job, layer: int | None, run: Callable[[Room, Caches], None], **more: Any
    ) -> None:
        self.launches.append(Launch(op, run, layer, tuple(job.paths), **more))
