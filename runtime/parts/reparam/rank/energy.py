"""Keep the singular values that hold a share of all their squares."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from annotated_types import Gt, Lt
from pydantic import Field
from torch import Tensor

from effc.passes.reparam._rank import RankRule
from effc.specs.paper import FOLKLORE
from effc.specs.units import Unit


class Energy(RankRule):
    """The least r with sum_{k <= r} s_k^2 >= share sum_k s_k^2, in each weight anew.

    Use when: weights differ in how quickly their spectra fall.
    """

    paper = FOLKLORE
    examples: ClassVar[tuple[str, ...]] = ("energy(95%)",)

    share: Annotated[float, Unit("share"), Gt(0), Lt(1)] = Field(
        description="share of the squares of all singular values"
    )

    def of(self, spectrum: Tensor) -> int:
        squares = spectrum.double().square().cumsum(0)
        return int(torch.searchsorted(squares, self.share * squares[-1] * (1 - 1e-12))) + 1
