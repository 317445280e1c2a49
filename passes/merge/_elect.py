"""Changes that disagree: settle for every weight which way to go, then average those that go there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from effc.compiler.shapes import Array, Spare
from effc.specs.diagnostic import Diagnostic

Sign = Literal["sum", "count"]

SIGN = np.uint32(1 << 31)
"""The sign bit of a float32."""
TINY = np.finfo(np.float32).tiny


def elected(changes: Sequence[Array], shares: Sequence[float], sign: Sign, spare: Spare) -> Array:
    """The mean of those changes that have the elected sign, weighted by their shares; 0 where none has.

    Args:
        changes: K arrays [N] float32; overwritten.
        shares: what each vote counts, above 0.
        sign: elect by the sum of shares x changes or by the sum of shares alone; + where they tie.
        spare: gives arrays to work in.
    """
    for change, share in zip(changes, shares, strict=True):
        if share != 1.0:
            change *= np.float32(share)
    lead, count, one = _lead(changes, shares, sign, spare), spare(), spare()
    down = lead.view(np.uint32)
    down &= SIGN
    count.fill(0)
    total = changes[0]
    for change, share in zip(changes, shares, strict=True):
        bits = change.view(np.uint32)
        bits ^= down
        np.maximum(change, 0, out=change)
        np.greater(change, 0, out=one)
        if share != 1.0:
            one *= np.float32(share)
        count += one
        total += change if change is not total else np.float32(0)  # -0 becomes 0, and sums are never -0
    np.maximum(count, TINY, out=count)  # where nothing is kept, 0 / TINY
    total /= count
    bits = total.view(np.uint32)
    bits ^= down
    return total


def _lead(changes: Sequence[Array], shares: Sequence[float], sign: Sign, spare: Spare) -> Array:
    """[N] of the elected signs, -0.0 nowhere but where no change is above 0."""
    lead = spare()
    if sign == "sum":
        np.copyto(lead, changes[0])
        for change in changes[1:]:
            lead += change
        return lead
    one = spare()
    lead.fill(0)
    for change, share in zip(changes, shares, strict=True):
        np.sign(change, out=one)
        one *= np.float32(share)
        lead += one
    return lead


def wrong_votes(kind: str, weight: Sequence[float]) -> list[Diagnostic]:
    """What is wrong with weights that vote."""
    if min(weight, default=1.0) > 0:
        return []
    return [
        Diagnostic(
            "E452",
            f"`weight` of `{kind}` holds {min(weight):g}",
            notes=("changes vote with their weight, so each must be above 0",),
            help="leave the model out, or unlearn it with merge.task_arithmetic(lambda = -1)",
            about="weight",
        )
    ]
