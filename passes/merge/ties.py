"""Merge changes to a base after settling, weight by weight, in which direction to go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, Field

from effc.compiler.contract import LOSSY, Contract
from effc.compiler.method import ModelRef
from effc.compiler.model import Model
from effc.compiler.shapes import Array, Merge, Spare
from effc.passes.merge._weights import shares, wrong_weights
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper
from effc.specs.units import Share

HIGH = 1 << 15
"""Bins of the first round: sign dropped, exponent and the upper 7 bits of the mantissa of a float32."""
LOW = 1 << 16
"""Bins of the second round: the lower 16 bits of the mantissa, within one bin of the first."""

TINY = np.finfo(np.float32).tiny


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
    contract = Contract(fidelity=LOSSY)
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
    sign: Literal["sum", "count"] = Field(
        default="sum", description="elect by the sum of the changes or by their number"
    )
    scope: Literal["model", "tensor"] = Field(default="model", description="what the density is a share of")

    @property
    def over(self) -> str:
        return self.scope

    def refuses(self, model: Model, others: Sequence[Model]) -> Sequence[Diagnostic]:
        wrong = wrong_weights(self.kind, self.weight, 1 + len(others))
        if min(self.weight, default=1.0) <= 0:
            wrong.append(
                Diagnostic(
                    "E452",
                    f"`weight` of `{self.kind}` holds {min(self.weight):g}",
                    notes=("changes vote with their weight, so each must be above 0",),
                    help="leave the model out, or unlearn it with merge.task_arithmetic(lambda = -1)",
                    about="weight",
                )
            )
        return [*super().refuses(model, others), *wrong]

    def observe(
        self, number: int, parts: Sequence[Array], base: Array | None, known: Array, spare: Spare
    ) -> Array:
        """Round 0: [K, HIGH] counts of the upper halves of |d_k|; round 1: [K, LOW] of the lower halves."""
        assert base is not None
        if number == 0:
            return np.stack([np.bincount(_upper(_bits(part, base)), minlength=HIGH) for part in parts])
        rows = []
        for part, (high, _) in zip(parts, known, strict=True):
            bits = _bits(part, base)
            low = bits[(bits >= high << 16) & (bits < (high + 1) << 16)] & 0xFFFF
            rows.append(np.bincount(low, minlength=LOW))
        return np.stack(rows)

    def settle(self, number: int, total: Array, known: Array) -> Array:
        """Round 0: [K, 2] the bin of each threshold, entries kept inside it; round 1: [K] the thresholds."""
        if number == 0:
            keep = np.maximum(1, np.rint(self.density * total.sum(1))).astype(np.int64)
            return np.array([_bin_of(row, count) for row, count in zip(total, keep, strict=True)])
        low = [_bin_of(row, count)[0] for row, (_, count) in zip(total, known, strict=True)]
        bits: Array = ((known[:, 0] << 16) | np.array(low)).astype(np.uint32)
        return bits.view(np.float32)

    def merge(self, parts: Sequence[Array], base: Array | None, known: Array, spare: Spare) -> Array:
        assert base is not None
        up, down, ups, downs, one = (spare() for _ in range(5))
        for total in (up, down, ups, downs):
            total.fill(0)
        for share, change, threshold in zip(shares(self.weight, len(parts)), parts, known, strict=True):
            change -= base
            np.abs(change, out=one)
            change *= np.greater_equal(one, threshold, out=one)
            for sums, counts, side, beyond in (
                (up, ups, np.maximum, np.greater),
                (down, downs, np.minimum, np.less),
            ):
                side(change, 0, out=one)
                sums += one if share == 1.0 else np.multiply(one, np.float32(share), out=one)
                beyond(change, 0, out=one)
                counts += one if share == 1.0 else np.multiply(one, np.float32(share), out=one)
        lead = np.add(up, down, out=one) if self.sign == "sum" else np.subtract(ups, downs, out=one)
        rising = np.greater_equal(lead, 0, out=lead)
        up *= rising
        ups *= rising
        falling = np.subtract(1, rising, out=rising)
        down *= falling
        downs *= falling
        up += down
        ups += downs
        np.maximum(ups, TINY, out=ups)  # where nothing is kept, 0 / TINY
        up /= ups
        up *= np.float32(self.lambda_)
        up += base
        merged: Array = up
        return merged


def _bits(part: Array, base: Array) -> Array:
    """|part - base| as its bit pattern [N] int32, which orders floats without sign as integers. In place."""
    part -= base
    bits: Array = part.view(np.int32)
    bits &= 0x7FFFFFFF
    return bits


def _upper(bits: Array) -> Array:
    bits >>= 16
    return bits


def _bin_of(counts: Array, keep: int) -> tuple[int, int]:
    """The bin that holds the `keep`-th largest entry, and how many entries of that bin are kept."""
    above = counts[::-1].cumsum()
    place = int(np.searchsorted(above, keep))
    before = int(above[place - 1]) if place else 0
    return len(counts) - 1 - place, int(keep) - before
