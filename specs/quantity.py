"""Quantities: which words are units of what, and what they are worth. One table, nothing imported.

A recipe writes a number with a unit (`keep = 75%`); the checked recipe holds it in the base unit (0.75).
"""

from __future__ import annotations

from collections.abc import Mapping

_THOUSANDS = {"k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
_BYTES = {
    "B": 1, "byte": 1, "bytes": 1,
    "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip


def _counted(*nouns: str) -> dict[str, float]:
    """`M`, `M tokens` and `tokens` for every thousand and noun."""
    spelled = {f"{k} {noun}": v for k, v in _THOUSANDS.items() for noun in nouns}
    return {**_THOUSANDS, **spelled, **dict.fromkeys(nouns, 1)}


DIMENSIONS: Mapping[str, Mapping[str, float]] = {
    "share": {"%": 0.01},
    "bytes": _BYTES,
    "count": _counted("params", "parameters", "sequences", "steps", "samples"),
    "tokens": _counted("token", "tokens"),
    "bits": {"bit": 1, "bits": 1},
    "seconds": {
        "ms": 1e-3, "s": 1, "sec": 1, "second": 1, "seconds": 1, "min": 60, "minute": 60, "minutes": 60,
        "h": 3600, "hour": 3600, "hours": 3600, "d": 86400, "day": 86400, "days": 86400,
    },
    "rate": {},
    "flops": _counted("flop", "flops"),
    "points": {"point": 0.01, "points": 0.01},
}  # fmt: skip
"""Dimension -> unit as written -> factor to the base unit (points: hundredths of an accuracy)."""

EXAMPLES: Mapping[str, str] = {
    "share": "75%",
    "bytes": "6 MB",
    "count": "20M",
    "tokens": "20M tokens",
    "bits": "3.5 bits",
    "seconds": "2 h",
    "rate": "3e-4",
    "flops": "20M flops",
    "points": "1 point",
}
UNITS = tuple(sorted({unit for units in DIMENSIONS.values() for unit in units}))


def to_base(number: float, unit: str | None, dimension: str | None) -> float | None:
    """A quantity in base units, an int where that is exact; None if the unit measures something else."""
    if unit is None:
        return number
    factor = DIMENSIONS.get(dimension or "", {}).get(unit)
    if factor is None:
        return None
    if factor < 1:  # 75% is 75 / 100, correctly rounded, where 75 * 0.01 need not be
        return number / round(1 / factor)
    value = number * factor
    return int(value) if isinstance(value, float) and value.is_integer() and factor != 1 else value


def dimensions_of(unit: str) -> list[str]:
    """What a unit may measure; empty for a word that is no unit."""
    return [name for name, units in DIMENSIONS.items() if unit in units]
