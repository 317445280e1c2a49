"""Multiply what every block adds to the residual stream."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Gt
from pydantic import ConfigDict, Field
from torch import fx, nn

from effc.compiler.blocks import Linear, Norm, StackedLinear
from effc.compiler.blocks.head import Scale
from effc.compiler.blocks.learned_scale import LearnedScale
from effc.compiler.contract import EXACT, HEALED, Contract, Fact
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Rewrite
from effc.passes._dense import shared, some
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper

_ENDS = {"attention": "o", "mlp": "down", "moe": "experts.down"}
"""Blocks of a layer -> the part that ends them."""


class ResidualScale(Rewrite):
    """x + f(x) becomes x + lambda f'(x), in every branch of every layer.

    lambda: 1 / sqrt(L) or 1 / L of L layers, a number, or one that is learned in each branch and starts at
    1. With fold, f' is f with its last W and b divided by lambda, so the function stays and training moves
    it by another rate; without, f' = f. `norm = remove` also takes away the norms before the branches. The
    paper writes of networks without norms and of no checkpoint: keeping a checkpoint's function by fold is
    effc's.

    Use when: a deep network trains badly: the expansion of prod (1 + lambda f_l) has C(L, k) paths of order
              k, which grow like 2^L with lambda = 1 and stay below e with 1 / L.
    Costs:    a multiplication for every number that is added. Capacity falls with lambda.
    """

    paper = Paper("On residual network depth", arxiv="2510.03470", year=2025, section="3")
    contract = Contract(
        EXACT.when(HEALED, fold=True, norm="keep"),
        keeps=tuple(
            Fact(name, "model") for name in ("dense", "low_rank", "adapter", "tied", "packed", "sparse")
        ),
    )
    examples = (
        "arch.residual_scale()",
        "arch.residual_scale(lambda = learned)",
        "arch.residual_scale(lambda = 0.5, fold = false, norm = remove)",
    )
    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    lambda_: Literal["inv_sqrt_depth", "inv_depth", "learned"] | Annotated[float, Gt(0)] = Field(
        default="inv_sqrt_depth", alias="lambda", description="factor of every branch, or the rule for it"
    )
    fold: bool = Field(
        default=True, description="divide the last weights of a branch by lambda, to keep the function"
    )
    norm: Literal["keep", "remove"] = Field(default="keep", description="whether norms before branches stay")

    def factor(self, layers: int) -> float:
        """lambda of a model of so many layers."""
        if isinstance(self.lambda_, float | int):
            return float(self.lambda_)
        rules: dict[str, float] = {"inv_sqrt_depth": layers**-0.5, "inv_depth": 1 / layers, "learned": 1.0}
        return rules[self.lambda_]

    def branches(self, model: Model) -> list[str]:
        """Paths of the blocks that end a branch, in graph order."""
        paths = (f"layers.{i}.{name}" for i in range(model.layers) for name in _ENDS)
        called = {str(n.target) for n in model.gm.graph.nodes if n.op == "call_module"}
        return [path for path in paths if path in called]

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        paths = self.branches(model)
        if not paths:
            return [
                Diagnostic("E330", f"`{self.kind}` needs layers with residual branches, and there are none")
            ]
        odd = [why for path in paths if (why := _not_added(model, path))]
        if odd:
            return [
                Diagnostic(
                    "E320",
                    f"`{self.kind}` scales branches that are added to the stream as they are",
                    notes=(odd[0],),
                    help="use a network with norms before its branches",
                )
            ]
        return list(self._undivided(model, paths)) if self.fold and self.lambda_ != "learned" else []

    def _undivided(self, model: Model, paths: Sequence[str]) -> Iterator[Diagnostic]:
        """Last matrices that cannot be divided."""
        ends = [_end(path) for path in paths]
        packed = [p for p in ends if not isinstance(model.module(p), Linear | StackedLinear)]
        if packed:
            yield Diagnostic(
                "E323",
                f"`{self.kind}` divides the last weights of branches, and needs them dense",
                notes=(f"{some(packed)}: {type(model.module(packed[0])).__name__}",),
                help="scale before packing or factoring, fold adapters first, or write fold = false",
                about="fold",
            )
        ties = shared(model)
        if tied := [p for p in ends if p in ties]:
            yield Diagnostic(
                "E341",
                f"`{self.kind}` cannot divide weights that layers share",
                notes=(f"{some(tied)} is shared",),
                help="scale before tie.recursive, or write fold = false",
                about="fold",
            )

    def outline(self, rw: Rewriter, others: Sequence[Model]) -> None:
        self._insert(rw, meta=True)

    def rewrite(self, rw: Rewriter) -> None:
        factor = self.factor(rw.model.layers)
        if self.fold and self.lambda_ != "learned":
            for path in map(_end, self.branches(rw.model)):
                unit = rw.module(path)
                for name in ("weight", "bias"):
                    if (tensor := getattr(unit, name, None)) is not None:
                        rw.write(path, name, tensor.detach() / factor, f"divided by {factor:.4g}")
        self._insert(rw, meta=False)

    def _insert(self, rw: Rewriter, meta: bool) -> None:
        factor = self.factor(rw.model.layers)
        for path in self.branches(rw.model):
            unit: Scale | LearnedScale = Scale(factor=factor)
            if self.lambda_ == "learned":
                unit = LearnedScale(dtype=rw.module(_end(path)).dtype)
                if not meta:
                    unit.weight = nn.Parameter(torch.ones(1, dtype=unit.weight.dtype), requires_grad=False)
            rw.insert(f"{path}_scale", unit, after=path)
        if self.norm == "remove":
            for path in [p for p in rw.paths("norm") if p.count(".") == 2]:
                rw.remove(path)


def _end(path: str) -> str:
    return f"{path}.{_ENDS[path.rpartition('.')[2]]}"


def _not_added(model: Model, path: str) -> str | None:
    """Why a branch is not scaled by scaling its block, in words."""
    node = next(n for n in model.gm.graph.nodes if n.op == "call_module" and n.target == path)
    for user in node.users:
        if user.target is not operator.add:
            return f"`{user.target}` stands between `{path}` and the stream"
        if any(
            _is_norm(model, after) and any(u.target is operator.add for u in after.users)
            for after in user.users
        ):
            return f"the stream behind `{path}` is normed"
    return None


def _is_norm(model: Model, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(model.module(str(node.target)), Norm)
