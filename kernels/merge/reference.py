"""What the kernels of merges give, in plain numpy with the same rounding and fresh arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from effc.compiler.shapes import Array
from effc.kernels.merge.asked import Mix

DOT_LANES = 32
"""Sums that a dot product is gathered in; number i goes to the sum i % DOT_LANES."""


def mixed(mix: Mix, parts: Sequence[Array], base: Array | None, draws: Sequence[Array]) -> Array:
    """K arrays [N] float32 of models, the base's, K of draws [N] uint16 -> merged [N] float32."""
    changes = []
    for k, part in enumerate(parts):
        change = part if base is None else part - base
        if mix.keep == "above":
            change = change * (np.abs(change) >= np.float32(mix.above[k]))
        if mix.keep == "drawn":
            change = change * (draws[k] < mix.below)
        changes.append(change * np.float32(mix.shares[k]))
    total = _added(changes) if mix.join == "sum" else _elected(mix, changes)
    return total if base is None else total + base


def _added(changes: Sequence[Array]) -> Array:
    total = changes[0]
    for change in changes[1:]:
        total = total + change
    return total


def _elected(mix: Mix, changes: Sequence[Array]) -> Array:
    """The mean of the changes that have the elected sign, times the scale; + where no sign leads."""
    shares = [np.float32(share) for share in mix.shares]
    votes = changes
    if mix.join == "voted":
        votes = [np.sign(c) * s for c, s in zip(changes, shares, strict=True)]
    down = np.signbit(_added(votes))
    agreed = [np.maximum(np.where(down, -c, c), 0) + np.float32(0) for c in changes]
    count = _added([(c > 0) * s for c, s in zip(agreed, shares, strict=True)])
    mean = _added(agreed) / np.maximum(count, np.finfo(np.float32).tiny)
    result: Array = np.where(down, -mean, mean) * np.float32(mix.scale)
    return result


def dotted(a: Array, b: Array) -> float:
    """a.b of float32 [N]: exact products, added in float64 in DOT_LANES sums one number after another, then
    those sums one after another.
    """
    products = np.zeros(-(-a.size // DOT_LANES) * DOT_LANES)
    np.multiply(a, b, out=products[: a.size], dtype=np.float64)
    lanes = np.add.reduce(products.reshape(-1, DOT_LANES), axis=0)
    return float(np.add.accumulate(lanes)[-1])
