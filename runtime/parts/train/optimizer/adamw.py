"""Adam with decoupled weight decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import nn

from effc.compiler.method import Optimizer
from effc.runtime.parts.train.optimizer._eager import eager
from effc.runtime.parts.train.optimizer._groups import decayed
from effc.specs.paper import Paper


class AdamW(Optimizer):
    """W <- (1 - lr wd) W - lr M' / (sqrt(V') + eps); M, V running means of G and G^2, M', V' unbiased.

    Use when: nothing speaks for another one.
    Costs:    two float32 numbers of state for each weight.
    """

    paper = Paper("Decoupled Weight Decay Regularization", arxiv="1711.05101", year=2017, section="2")
    examples: ClassVar[tuple[str, ...]] = (
        "adamw(lr = 3e-4)",
        "adamw(lr = 1e-3, betas = [0.9, 0.95], wd = 0.1)",
    )

    lr: float = Field(default=3e-4, ge=0, le=10, description="learning rate at the height of the schedule")
    betas: tuple[float, float] = Field(
        default=(0.9, 0.95), description="how much of M and of V is kept each step"
    )
    eps: float = Field(default=1e-8, gt=0, description="added to the root of V")
    wd: float = Field(
        default=0.1, ge=0, description="weight decay of matrices; gains and biases do not decay"
    )

    def build(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        groups = decayed(parameters, self.wd)
        return eager(torch.optim.AdamW)(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)

    def state_bytes(self, shape: torch.Size) -> int:
        """M and V in float32, and a step count."""
        return 8 * shape.numel() + 4
