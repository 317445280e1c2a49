"""A factor on every residual branch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from annotated_types import Gt
from pydantic import Field

from effc.compiler.rewrite import Rewriter
from effc.passes.arch.residual_scale import ResidualScale as Swap
from effc.runtime.models._blocks import BlockPart


class ResidualScale(BlockPart):
    """x + lambda f(x): 1 / sqrt(L) or 1 / L of L layers, a number, or learned from 1 on.

    Use when: a deep model trains badly, or does without norms.
    """

    paper = Swap.paper
    examples: ClassVar[tuple[str, ...]] = (
        "residual_scale()",
        "residual_scale(lambda = inv_depth, norm = remove)",
    )

    lambda_: Literal["inv_sqrt_depth", "inv_depth", "learned"] | Annotated[float, Gt(0)] = Field(
        default="inv_sqrt_depth", alias="lambda", description="factor of every branch, or the rule for it"
    )
    norm: Literal["keep", "remove"] = Field(
        default="keep", description="whether there are norms before branches"
    )

    def put(self, rw: Rewriter) -> None:
        Swap.model_validate({"lambda": self.lambda_, "norm": self.norm, "fold": False}).outline(rw, ())
