"""Units: the types of fields that measure something, and how numbers are printed with units.

A field says what it measures (`keep: Share`), a recipe writes it with a unit (`keep = 75%`), the field gets
the number in the base unit (0.75). `specs/quantity.py` has the words.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Annotated

from annotated_types import Ge, Le


@dataclass(frozen=True, slots=True)
class Unit:
    """Metadata of a numeric field: the dimension, a key of `quantity.DIMENSIONS`."""

    dimension: str


@dataclass(frozen=True, slots=True)
class Gradient:
    """A number that runs over the layers in a straight line, written `depth(0.3, 0.7)`.

    A field that allows it says so in its type: `keep: Share | Gradient`.
    """

    first: float
    last: float

    def at(self, layer: int | None, layers: int) -> float:
        """The number in one layer; the mean of both ends outside the layers."""
        if layer is None:
            return (self.first + self.last) / 2
        return self.first + (self.last - self.first) * (layer / (layers - 1) if layers > 1 else 0.0)


Share = Annotated[float, Unit("share"), Ge(0), Le(1)]
"""0..1, written 75% or 0.75."""
Bytes = Annotated[int, Unit("bytes"), Ge(0)]
Count = Annotated[int, Unit("count"), Ge(0)]
"""A number of things, written 20M or 20000000."""
Tokens = Annotated[int, Unit("tokens"), Ge(0)]
Bits = Annotated[float, Unit("bits"), Ge(0)]
Seconds = Annotated[float, Unit("seconds"), Ge(0)]
Rate = Annotated[float, Unit("rate"), Ge(0)]
"""A learning rate: a plain number."""


def fmt_bytes(n: float) -> str:
    """15_680_000 -> "15.7 MB"; decimal units, as recipes write them."""
    return _scaled(n, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)), "B")


def fmt_count(n: float) -> str:
    """7_841_000 -> "7.84M"."""
    return _scaled(n, (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)), "", 3).replace(" ", "")


def fmt_share(x: float) -> str:
    """0.75 -> "75%"."""
    return f"{x * 100:.4g}%"


def fmt_seconds(x: float) -> str:
    """95 -> "1 min 35 s"; 0.034 -> "34 ms"."""
    if not isfinite(x) or x < 0:
        return "unknown"
    if x < 0.9995:
        return f"{x * 1000:.3g} ms"
    if x < 59.95:
        return f"{x:.3g} s"
    minutes, seconds = divmod(round(x), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def _scaled(n: float, steps: tuple[tuple[str, float], ...], base: str, digits: int = 3) -> str:
    for unit, size in steps:
        if abs(n) >= size * 0.9995:
            scaled = f"{n / size:.{digits}g}"
            return f"{float(scaled):g} {unit}"
    return f"{n:g} {base}".rstrip()
