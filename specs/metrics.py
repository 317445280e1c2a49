"""Metrics: what an `expect` may measure, what it takes and in which unit its numbers are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Measure:
    summary: str
    takes: Literal["nothing", "sequences", "questions", "number"]
    dimension: str
    """A key of `quantity.DIMENSIONS`, or a word of its own for plain numbers."""
    example: str


MEASURES: Mapping[str, Measure] = {
    "bytes": Measure(
        "bytes of the model as an artefact stores it", "nothing", "bytes", "small.bytes <= 6 MB"
    ),
    "params": Measure("logical weights, a tied one once", "nothing", "count", "small.params <= 8M"),
    "flops": Measure("floating-point operations a token", "nothing", "flops", "small.flops <= 20M"),
    "spent": Measure(
        "floating-point operations a token, counted while held-out data run",
        "sequences",
        "flops",
        "fast.spent(code) <= base.flops - 20%",
    ),
    "kv_bytes": Measure("bytes of a cache of T tokens", "number", "bytes", "small.kv_bytes(4096) <= 6 MB"),
    "loss": Measure(
        "nats a token, on held-out data", "sequences", "nats", "small.loss(code) <= base.loss(code) + 3%"
    ),
    "bpb": Measure(
        "bits a byte of text, on held-out data", "sequences", "bits a byte", "small.bpb(code) <= 1.9"
    ),
    "acc": Measure(
        "share of questions answered right",
        "questions",
        "points",
        "small.acc(quiz) >= base.acc(quiz) - 1 point",
    ),
    "findings": Measure(
        "what an analysis found against its model", "nothing", "count", "isolated.findings <= 0"
    ),
    "latency": Measure("seconds to decode one token", "nothing", "seconds", "small.latency <= 20 ms"),
}
