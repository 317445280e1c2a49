"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from effc.compiler.method import Optimizer
from effc.runtime.parts.train.optimizer._eager import eager
from effc.runtime.parts.train.optimizer._groups import decayed
from effc.specs.paper import FOLKLORE


class SGD(Optimizer):
    """M <- momentum M + G; W <- W - lr M.

    Use when: memory is short, or as the plain line of comparison.
    Costs:    one float32 number of state for each weight, none without momentum.
    """

    paper = FOLKLORE
    examples: ClassVar[tuple[str, ...]] = ("sgd(lr = 0.1)", "sgd(lr = 0.1, momentum = 0.9, nesterov = true)")

    lr: float = Field(default=0.1, ge=0, le=100, description="learning rate at the height of the schedule")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="how much of M is kept each step")
    nesterov: bool = Field(default=False, description="look ahead by one step of momentum")
    wd: float = Field(default=0.0, ge=0, description="weight decay of matrices, added to their gradient")

    @model_validator(mode="after")
    def _momentum_to_look_ahead(self) -> Self:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum above 0")
        return self

    def build(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        groups = decayed(parameters, self.wd)
        return eager(torch.optim.SGD)(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)

    def state_bytes(self, shape: torch.Size) -> int:
        """M in float32."""
        return 4 * shape.numel() if self.momentum else 0
