"""Launching: collects the launches of one program of a GPU, and gives them the model's tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from effc.compiler.model import Model
from effc.kernels.gpu.launches import Attended, Caches, Launch, Room
from effc.passes.lower._jobs import Job, Jobs


@dataclass(slots=True)
class Launching:
    """What the launches of jobs are written into."""

    model: Model
    jobs: Jobs
    device: torch.device
    launches: list[Launch] = field(default_factory=list)
    attentions: list[Attended] = field(default_factory=list)
    angles: dict[str, Callable[[int], tuple[Tensor, Tensor]]] = field(default_factory=dict)
    """By rotary settings, so that layers share their tables."""

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor of the model as a kernel reads it."""
        return self.model.tensors()[name].detach().to(self.device, dtype).contiguous()

    def add(
        self, op: str, job: Job, layer: int | None, run: Callable[[Room, Caches], None], **more: Any
    ) -> None:
        self.launches.append(Launch(op, run, layer, tuple(job.paths), **more))
