"""The words of the report: its measures, and numbers as a person writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from effc.specs.units import fmt_bytes, fmt_count, fmt_seconds

Record = Mapping[str, Any]
"""What `effc compile --json` prints, or one stage of it."""

MINUS = "\N{MINUS SIGN}"
LOSS_NOISE = 0.002
"""Relative change of a loss below which the page calls it unchanged."""


@dataclass(frozen=True, slots=True)
class Measure:
    """One column of the waterfall: where its value lies in a stage, and how it is written."""

    key: str
    title: str
    unit: str


MEASURES = (
    Measure("bytes", "Size", ""),
    Measure("flops_per_token", "Work a token", "FLOP"),
    Measure("latency", "Time a token", ""),
    Measure("loss", "Loss", "nats"),
)


def fmt_number(value: Any) -> str:
    if value is None:
        return "—"
    return fmt_count(int(value)) if abs(value) >= 10_000 else f"{value:.4g}"


def worded(measure: Measure, value: float) -> str:
    match measure.key:
        case "bytes":
            return fmt_bytes(int(value))
        case "latency":
            return fmt_seconds(value)
        case "loss":
            return f"{value:.3f}"
    return fmt_count(int(value))


def tone_of(measure: Measure, before: float, after: float) -> str:
    slack = LOSS_NOISE if measure.key == "loss" else 0.0
    if abs(after - before) <= slack * abs(before):
        return "same"
    return "better" if after < before else "worse"


def fmt_change(before: float, after: float) -> str:
    """`-66%`, `+2.4%`, `unchanged`."""
    if not before or before == after:
        return "unchanged" if before == after else ""
    percent = 100 * (after - before) / before
    text = f"{percent:+.0f}" if abs(percent) >= 10 else f"{percent:+.1f}"
    return "unchanged" if float(text) == 0 else text.replace("-", MINUS) + "%"


def many(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def value_of(stage: Record | None, key: str) -> float | None:
    """The value of one measure; a loss is that on the first data it was measured on."""
    value = stage.get(key) if stage else None
    if isinstance(value, Mapping):
        value = next(iter(value.values()), None)
    return None if value is None else float(value)
