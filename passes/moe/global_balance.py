"""Balance the experts of a mixture over a whole optimizer step, not over each part of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from effc.compiler.blocks.moe import Scope
from effc.compiler.contract import EXACT, Contract, Fact
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Rewrite
from effc.passes.moe._mixtures import changes, none_found, reset, unchanged
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper


class GlobalBalance(Rewrite):
    """Add coef E sum_i f_i p_i for each mixture to the loss of the training stages that follow.

    f_i is the share of choices that fell on expert i, p_i its mean probability in the part at hand. With
    `scope = global` f counts all parts of the optimizer step so far, so that a part of one domain may use its
    own experts as long as the step is balanced; `micro` counts each part alone. f has no gradient. The least
    value is coef, at equal use. A step of one part has the same loss in both scopes.

    Use when: `accumulate` is above 1 and text of one domain stands together.
    Costs:    E counts for each mixture; inference is untouched.
    """

    paper = Paper(
        "Demons in the Detail: On Implementing Load Balancing Loss for Training Specialized "
        "Mixture-of-Expert Models",
        arxiv="2501.11873",
        year=2025,
        section="3",
    )
    contract = Contract(
        EXACT,
        needs=(Fact("mixture"),),
        gives=(Fact("mixture"),),
        keeps=tuple(Fact(name) for name in ("packed", "sparse", "sparse_2_4", "sparse_4_8", "unit_gain")),
    )
    examples = ("moe.global_balance()", "moe.global_balance(coef = 0.001, scope = micro, per_layer = false)")

    coef: float = Field(default=0.01, ge=0, description="weight of the loss; 0: none")
    scope: Scope = Field(default="global", description="whether f counts the step so far or the part alone")
    per_layer: bool = Field(
        default=True, description="a loss for each layer; false: one for all, over their means of f and p"
    )

    @property
    def wanted(self) -> dict[str, Any]:
        """The arguments of the blocks."""
        return {"balance": self.coef, "scope": self.scope, "pooled": not self.per_layer}

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        return none_found(self.kind, model) or unchanged(self.kind, model, self.wanted)

    def rewrite(self, rw: Rewriter) -> None:
        reset(rw, changes(rw.model, self.wanted), self.wanted, f"balance {self.coef:g}, {self.scope}")
