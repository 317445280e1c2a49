"""Merge changes to a base after settling, weight by weight, in which direction to go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import ConfigDict, Field, model_validator

from effc.compiler.contract import LOSSY, Contract, Fact
from effc.compiler.method import ModelRef
from effc.compiler.model import Model
from effc.compiler.shapes import Array, Merge, Spare, Spot
from effc.kernels.merge.asked import Look, Mix
from effc.kernels.merge.counts import HIGH
from effc.passes.merge._elect import Sign, elected, wrong_votes
from effc.passes.merge._weights import shares, wrong_weights
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper
from effc.specs.units import Share

LOW = 1 << 16
"""Bins of the second round: the lower 16 bits of the mantissa, within one bin of the first."""


class Ties(Merge):
    """Trim each change to its largest entries, elect a sign for every weight, average the changes that agree.

    With d_k = theta_k - base, trimmed to the `density` share of largest |d_k|: the sign is that of
    sum_k w_k d_k, and theta = base + lambda * (sum of w_k d_k with that sign) / (sum of their w_k).
    The threshold of a trim is found exactly by two radix histograms, without sorting.

    Use when: fine-tunes of one base disagree, so that adding them up would cancel what they learned.
    Costs:    nothing at run time; reads the models three times.
    """

    paper = Paper(
        "TIES-Merging: Resolving Interference When Merging Models", arxiv="2306.01708", year=2023, section="4"
    )
    contract = Contract(fidelity=LOSSY, needs=(Fact("dense"),))
    examples = (
        "merge.ties(base = base)",
        "merge.ties(base = base, density = 50%, lambda = 1.2, scope = tensor)",
    )
    models: ClassVar[tuple[int, int | None]] = (1, None)
    rounds: ClassVar[int] = 2

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    base: ModelRef = Field(description="the model that the others were fine-tuned from")
    density: Share = Field(default=0.2, gt=0, le=1, description="share of each change that is kept")
    weight: tuple[float, ...] = Field(default=(), description="factor of each change; all 1 unless written")
    lambda_: float = Field(default=1.0, alias="lambda", description="factor of the merged change")
    sign: Sign = Field(default="sum", description="elect by the sum of the changes or by their number")
    scope: Literal["model", "tensor"] = Field(default="model", description="what the density is a share of")

    @model_validator(mode="after")
    def _moves_something(self) -> Self:
        if not self.lambda_:
            raise ValueError("lambda = 0 gives back the base; write another factor, or use the base itself")
        return self

    @property
    def over(self) -> str:
        return self.scope

    def refuses(self, model: Model, others: Sequence[Model]) -> Sequence[Diagnostic]:
        """`others` ends with the base."""
        wrong = wrong_weights(self.kind, self.weight, len(others))  # the base is one of the others
        return [*super().refuses(model, others), *wrong, *wrong_votes(self.kind, self.weight)]

    def observe(
        self, number: int, parts: Sequence[Array], base: Array | None, known: Array, spare: Spare
    ) -> Array:
        """Round 0: [K, HIGH] counts of the upper halves of |d_k|. Round 1: how many of each model share
        the upper half of its threshold, then their lower halves, one model after another."""
        assert base is not None
        if number == 0:
            wide = spare(np.int64)  # what bincount takes without a copy
            return np.stack([_counts(_bits(part, base), wide) for part in parts])
        rows = [_within(_bits(part, base), int(high)) for part, (high, _) in zip(parts, known, strict=True)]
        return np.concatenate([np.array([row.size for row in rows], np.uint32), *rows])

    def look(self, number: int, known: Array) -> Look:
        return Look("upper") if number == 0 else Look("lower", known[:, 0].tolist())

    def settle(self, number: int, seen: Iterable[Array], known: Array) -> Array:
        """Round 0: [K, 2] the bin of each threshold, entries kept inside it; round 1: [K] the thresholds."""
        if number == 0:
            total = _sum(seen)
            keep = np.maximum(1, np.rint(self.density * total.sum(1))).astype(np.int64)
            return np.array([_bin_of(row, count) for row, count in zip(total, keep, strict=True)])
        total = np.zeros((len(known), LOW), np.int64)
        for row in seen:
            start = len(known)
            for k, size in enumerate(row[:start].tolist()):
                np.add.at(total[k], row[start : start + size], 1)
                start += size
        low = [_bin_of(row, count)[0] for row, (_, count) in zip(total, known, strict=True)]
        bits: Array = ((known[:, 0] << 16) | np.array(low)).astype(np.uint32)
        return bits.view(np.float32)

    def mix(self, models: int, known: Array) -> Mix:
        return Mix(
            shares(self.weight, models),
            "elected" if self.sign == "sum" else "voted",
            "above",
            known.tolist(),
            scale=self.lambda_,
        )

    def merge(
        self, parts: Sequence[Array], base: Array | None, known: Array, spare: Spare, spot: Spot
    ) -> Array:
        assert base is not None
        one = spare()
        for change, threshold in zip(parts, known, strict=True):
            change -= base
            np.abs(change, out=one)
            change *= np.greater_equal(one, threshold, out=one)
        change = elected(parts, shares(self.weight, len(parts)), self.sign, spare)
        if self.lambda_ != 1.0:
            change *= np.float32(self.lambda_)
        change += base
        return change


def _bits(part: Array, base: Array) -> Array:
    """|part - base| as its bit pattern [N] uint32, which orders floats without sign as integers. In place."""
    part -= base
    bits: Array = part.view(np.uint32)
    bits &= np.uint32(0x7FFFFFFF)
    return bits


def _counts(bits: Array, wide: Array) -> Array:
    """[HIGH] how often each upper half occurs."""
    np.right_shift(bits, 16, out=wide)
    return np.bincount(wide, minlength=HIGH)


def _within(bits: Array, high: int) -> Array:
    """The lower halves of those that have this upper half. In place."""
    bits -= np.uint32(high << 16)
    return bits[bits < LOW]


def _sum(seen: Iterable[Array]) -> Array:
    total: Array | None = None
    for row in seen:
        total = row if total is None else np.add(total, row, out=total)
    assert total is not None
    return total


def _bin_of(counts: Array, keep: int) -> tuple[int, int]:
    """The bin that holds the `keep`-th largest entry, and how many entries of that bin are kept."""
    above = counts[::-1].cumsum()
    place = int(np.searchsorted(above, keep))
    before = int(above[place - 1]) if place else 0
    return len(counts) - 1 - place, int(keep) - before
