"""Rule: a named edit of every place where a pattern holds, and the method that is made of rules.

@effc.rule("fold_gain", "n: norm[users=1] -> l: linear", contract=effc.EXACT)
def fold_gain(rw, hit): ...
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from effc.compiler.contract import EXACT, Contract, Fidelity
from effc.compiler.match import Hit, find
from effc.compiler.pattern import Pattern
from effc.compiler.pattern import pattern as parsed
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Rewrite
from effc.specs.diagnostic import Diagnostic, EffcError

if TYPE_CHECKING:
    from effc.compiler.model import Model

Edits = Callable[[Rewriter, Hit], object]

_NAME = re.compile(r"[A-Za-z][\w.-]{0,63}\Z")


class Failed(Exception):
    """A rule's function raised; `__cause__` is what it raised."""

    def __init__(self, hit: Hit) -> None:
        super().__init__(str(hit))
        self.hit = hit


@dataclass(frozen=True, slots=True)
class Rule:
    """What a function does to each place where a pattern holds, and how far that may move the model."""

    name: str
    pattern: Pattern
    fidelity: Fidelity
    edits: Edits

    def __call__(self, rw: Rewriter, hit: Hit) -> None:
        self.edits(rw, hit)

    def sweep(self, rw: Rewriter) -> list[Hit]:
        """Edit every place where the pattern holds now, in graph order; places that edits before them undid
        are left out. Gives the places where something changed.

        Raises:
            EffcError: E408, as matching does.
            Failed: the function raised something, at a hit.
        """
        applied: list[Hit] = []
        holding, seen = find(rw.model, self.pattern), len(rw.log)
        for hit in list(holding):
            since = rw.log[seen:]
            if any(edit.verb != "write" for edit in since) or (since and self._reads_dtype):
                holding, seen = find(rw.model, self.pattern), len(rw.log)
            if hit not in holding or not self._judged(rw, hit, seen):
                continue
            edits = len(rw.log)
            try:
                self.edits(rw, hit)
            except Exception as problem:
                raise Failed(hit) from problem
            if len(rw.log) > edits:
                applied.append(hit)
        return applied

    @property
    def _reads_dtype(self) -> bool:
        """Whether writing a tensor, which keeps all shapes, may change where the pattern holds."""
        return any(c.field == "dtype" for element in self.pattern.elements for c in element.conditions)

    def _judged(self, rw: Rewriter, hit: Hit, seen: int) -> bool:
        """Whether the pattern's function still says yes, where tensors were written since it was asked."""
        where = self.pattern.where
        return where is None or len(rw.log) == seen or where(rw.model, hit)


def rule(name: str, pattern: str | Pattern, contract: Fidelity | Contract = EXACT) -> Callable[[Edits], Rule]:
    """Make a rule of a function (rewriter, hit) -> None. `contract` says how far the outputs may move.

    Raises:
        EffcError: E404 when the pattern does not parse.
        ValueError: the name is none that files and reports could carry.
    """
    if not _NAME.match(name):
        raise ValueError(f"a rule is named by a word such as fold_gain, not {name!r}")
    where = pattern if isinstance(pattern, Pattern) else parsed(pattern)
    fidelity = contract.fidelity if isinstance(contract, Contract) else contract

    def make(edits: Edits) -> Rule:
        return Rule(name, where, fidelity, edits)

    return make


class Ruled(Rewrite):
    """A method that is made of rules: each is swept over the model once, in order.

    A subclass states `rules` beside paper, contract and examples, and needs no verb.
    """

    rules: ClassVar[tuple[Rule, ...]]

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        if any(find(model, rule.pattern) for rule in self.rules):
            return ()
        looked = tuple(f"{rule.name} looks for {rule.pattern.text}" for rule in self.rules)
        return [
            Diagnostic(
                "E320",
                f"`{self.kind}` finds nothing to edit in this model",
                notes=looked,
                help="leave the stage out; `effc show MODEL` prints the blocks there are",
            )
        ]

    def rewrite(self, rw: Rewriter) -> None:
        for rule in self.rules:
            try:
                rule.sweep(rw)
            except Failed as failed:
                if isinstance(failed.__cause__, EffcError):
                    raise failed.__cause__ from None
                raise
