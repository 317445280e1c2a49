"""What methods that set weights to zero share: fields, refusals, and the edit itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

from annotated_types import Lt
from pydantic import Field, field_validator
from torch import Tensor

from effc.compiler.contract import LOSSY, Contract, Fact
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.selects import Selects
from effc.passes._dense import inputs_of, matrix, not_dense, some
from effc.passes.prune._pattern import CHUNK, Pattern, lowest_in_groups, sides
from effc.specs.diagnostic import Diagnostic
from effc.specs.units import Gradient, Share

SPARSE = Contract(
    LOSSY,
    needs=(Fact("dense", "select"),),
    gives=(
        Fact("sparse", "select"),
        Fact("sparse_2_4", "select").when(pattern="2:4"),
        Fact("sparse_4_8", "select").when(pattern="4:8"),
    ),
    keeps=(Fact("dense"), Fact("tied")),
)


class Sparse(Selects):
    """Fields and refusals of a method that sets weights to zero."""

    overrides = ("sparsity", "pattern")

    sparsity: Annotated[Share, Lt(1)] | Gradient = Field(
        default=0.5,
        description="share of weights set to zero, or depth(first, last); n:m patterns fix it at 50%",
    )
    pattern: Pattern = Field(
        default="unstructured", description="any weights, or 2 of 4 or 4 of 8 neighboring inputs stay"
    )

    @field_validator("sparsity")
    @classmethod
    def _leaves_something(cls, given: float | Gradient) -> float | Gradient:
        if isinstance(given, Gradient) and not all(0 <= end < 1 for end in (given.first, given.last)):
            raise ValueError("both ends of a gradient must be at least 0% and below 100%")
        return given

    @property
    def share(self) -> float:
        """The sparsity where this method applies, as `targets` gives it."""
        if isinstance(self.sparsity, Gradient):
            raise TypeError("a gradient has a number only in a layer; take the method from `targets`")
        return self.sparsity

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        targets = self.targets(model)
        return [
            *self._clashes(targets),
            *self._unfit(model, targets),
            *not_dense(self.kind, "prune", model, targets),
        ]

    def mask_in_groups(self, scores: Tensor) -> Tensor:
        """Where the pattern n:m sets scores [R, i] to zero."""
        return lowest_in_groups(scores, *sides(self.pattern))

    def _clashes(self, targets: Mapping[str, Sparse]) -> Iterator[Diagnostic]:
        for path, method in targets.items():
            if method.pattern != "unstructured" and method.share != 0.5:
                yield Diagnostic(
                    "E325",
                    f"the pattern {method.pattern} of `{self.kind}` means 50%, not {method.share:.0%}",
                    notes=(f"at {path}",),
                    help="leave `sparsity` out, or use pattern = unstructured",
                    about="sparsity",
                )
                return

    def _unfit(self, model: Model, targets: Mapping[str, Sparse]) -> Iterator[Diagnostic]:
        seen: dict[tuple[str, int], list[str]] = {}
        for path, method in targets.items():
            inputs = inputs_of(model.module(path))
            if method.pattern != "unstructured" and inputs % sides(method.pattern)[1]:
                seen.setdefault((method.pattern, inputs), []).append(path)
        for (pattern, inputs), paths in seen.items():
            m = sides(pattern)[1]
            fits = [p for p in ("2:4", "4:8") if inputs % sides(p)[1] == 0]
            yield Diagnostic(
                "E324",
                f"the pattern {pattern} needs in_features divisible by {m}; {some(paths)} has {inputs}",
                help=f"use pattern = {' or '.join([*fits, 'unstructured'])}, or `except` for these modules",
                about="pattern",
            )


def zero(rw: Rewriter, path: str, mask: Tensor) -> float:
    """Set the weights under mask [R, i] to zero; returns the share of the weight's norm that is lost."""
    module = rw.present(path)
    w = matrix(module)
    whole = lost = 0.0
    rows = max(1, CHUNK // max(1, w.shape[1]))
    for part, gone in zip(w.split(rows), mask.split(rows), strict=True):
        squares = part.double().square_()
        whole += float(squares.sum())
        lost += float(squares.masked_fill_(~gone, 0).sum())
    kept = w.masked_fill(mask, 0)
    detail = f"{int(mask.count_nonzero())} of {mask.numel()} weights are zero"
    rw.write(path, "weight", kept.view_as(module.weight), detail)
    return math.sqrt(lost / whole) if whole > 0 else 0.0
