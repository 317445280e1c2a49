"""Schedule: says before the first layer how many layers each token runs, by its position alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from effc.compiler.blocks.unit import Unit
from effc.compiler.ops_adaptive import DEPTH, schedule, whole_prompt
from effc.compiler.step import Step

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value


class Schedule(Unit):
    """n(t) = round(most - (most - least) min(t / horizon, 1)) of the token at position t; x passes through.

    `prompt`: whether a prompt, as long as it is read at once, runs `most` layers wherever it is.
    """

    takes_step = True

    def __init__(self, *, most: int, least: int, horizon: int, prompt: bool = True) -> None:
        super().__init__()
        if not 0 < least <= most or horizon == 0:
            raise ValueError(f"{most} layers that fall to {least} over {horizon} positions: no schedule")
        self.most = most
        self.least = least
        self.horizon = horizon
        self.prompt = prompt

    def expand(self, ops: Ops, x: Value) -> Value:
        depth = ops("schedule", x, ops.step, most=self.most, least=self.least, horizon=self.horizon)
        if self.prompt:
            depth = ops("whole_prompt", depth, ops.step, most=self.most)
        return ops("tell", x, ops.step, depth, side=DEPTH)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        depth = schedule(x, step, most=self.most, least=self.least, horizon=self.horizon)
        step.sides[DEPTH] = whole_prompt(depth, step, most=self.most) if self.prompt else depth
        return x
