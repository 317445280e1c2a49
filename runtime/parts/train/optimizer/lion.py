"""Lion: steps of one size, in the direction of the sign of the momentum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, overload

import torch
from pydantic import Field
from torch import nn

from effc.compiler.method import Optimizer
from effc.runtime.parts.train.optimizer._eager import eager
from effc.runtime.parts.train.optimizer._groups import decayed
from effc.specs.paper import Paper


class Lion(Optimizer):
    """C = b1 M + (1 - b1) G; W <- W - lr (sign(C) + wd W); then M <- b2 M + (1 - b2) G.

    Use when: optimizer state must halve, and batches are large.
    Costs:    one float32 number of state for each weight; wants a rate 3 to 10 times below AdamW's and as
              much more decay. Clipping matters little: the sign bounds every step.
    """

    paper = Paper("Symbolic Discovery of Optimization Algorithms", arxiv="2302.06675", year=2023, section="4")
    examples: ClassVar[tuple[str, ...]] = (
        "lion(lr = 1e-4)",
        "lion(lr = 1e-4, betas = [0.95, 0.98], wd = 1.0)",
    )

    lr: float = Field(default=1e-4, ge=0, le=0.1, description="learning rate at the height of the schedule")
    betas: tuple[float, float] = Field(default=(0.9, 0.99), description="b1 of the step, b2 of what is kept")
    wd: float = Field(
        default=1.0, ge=0, description="weight decay of matrices; gains and biases do not decay"
    )

    def build(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return eager(LionSteps)(decayed(parameters, self.wd), lr=self.lr, betas=self.betas)

    def state_bytes(self, shape: torch.Size) -> int:
        """M in float32."""
        return 4 * shape.numel()


class LionSteps(torch.optim.Optimizer):
    """The update as a torch optimizer, over all parameters of a group at once."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        if closure is not None:
            raise TypeError("this optimizer takes steps without a closure")
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            if not moving:
                continue
            kept = [self._kept(p) for p in moving]
            gradients = [p.grad for p in moving]
            b1, b2 = group["betas"]
            toward = torch._foreach_lerp(kept, gradients, 1 - b1)
            torch._foreach_sign_(toward)
            torch._foreach_mul_(moving, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(moving, toward, alpha=-group["lr"])
            torch._foreach_lerp_(kept, gradients, 1 - b2)
        return None

    def _kept(self, parameter: torch.Tensor) -> torch.Tensor:
        """M of a parameter, zeros at first."""
        state = self.state[parameter]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(parameter)
        found: torch.Tensor = state["exp_avg"]
        return found
