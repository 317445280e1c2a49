"""What a run does around its stages: it opens data, measures for the report, judges, and exports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from effc.compiler.blocks.quant_linear import Packed
from effc.compiler.cost import count
from effc.compiler.effort import stored, width
from effc.compiler.model import Model
from effc.specs.recipe import Recipe
from effc.specs.target import Target

BYTES_PER_TOKEN = 3.0
"""Of text, about, for tokenizers of a few thousand tokens; larger ones take fewer tokens and less time."""
REPORTED = 8192
"""Held-out tokens behind the losses of the report."""
SHARE = 0.3
"""Largest share of main memory that a model may take to be measured for the report alone."""
LIGHT = 64 * 10**6
"""Bytes of it in a recipe that streams weights, where nothing else would build a model."""
DECODED = 24
"""Steps behind the latency of a model."""
STARTED = 400
"""Operations whose start takes as long as a layer of one decoding step, interpreter included; measured."""
COMPILED = 3.0
"""Seconds to lower a model with packed weights and to compile its program, the first time; measured."""
MEAN = 128
"""Keys that a token attends to on average in sequences of 256."""
PROBED = 311
"""Tokens that a contract is probed with: two random inputs, and a held-out sequence of 256."""


@dataclass(frozen=True, slots=True)
class Text:
    """What a `data` binding reads, in bytes."""

    bytes: int = 0
    heldout: int = 0


@dataclass(frozen=True, slots=True)
class Around:
    """One line of a plan or of a run that is no stage."""

    name: str
    """data, report, expect or export"""
    what: str
    """which data; the metrics that are judged; the model and format"""
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "what": self.what, "seconds": self.seconds}


LOSSES = "losses and latencies"
"""What is measured of every model for the report."""


def judged(recipe: Recipe) -> str:
    """How its expects are called: `3 judged`."""
    return f"{len(recipe.expects)} judged"


def exported(format_: str, model: str) -> str:
    """How an export is called in plans and runs: `hf of heal`."""
    return f"{format_} of {model}"


def streams(recipe: Recipe) -> bool:
    """Whether a recipe only merges and exports, so that it builds no model."""
    return all(b.keyword == "model" or b.call.kind.startswith("merge.") for b in recipe.bindings)


def reportable(recipe: Recipe, memory: float) -> float:
    """Bytes of the largest model that is measured for the report alone."""
    return LIGHT if streams(recipe) else SHARE * memory


def around(
    recipe: Recipe, models: Mapping[str, Model], texts: Mapping[str, Text], target: Target
) -> Iterator[Around]:
    """Every line beside the stages, in the order of what they are about."""
    for name, text in texts.items():
        yield Around("data", name, text.bytes / target.tokenize)
    loads = {name: _Load.of(model, target) for name, model in models.items()}
    most = reportable(recipe, target.memory_bytes)
    small = [load for load in loads.values() if load.bytes <= most]
    if small:
        yield Around("report", LOSSES, sum(load.reported(texts, target) for load in small))
    sides = {
        (metric.model, metric.data.name): None
        for expect in recipe.expects
        for metric in expect.metrics()
        if metric.data is not None and metric.data.name in texts and metric.model in models
    }
    if recipe.expects:
        seconds = sum(loads[m].forward(texts[d].heldout / BYTES_PER_TOKEN) for m, d in sides)
        yield Around("expect", judged(recipe), seconds)
    for export in recipe.exports:
        if export.model in models:
            reader = target.start if export.call.kind == "artifact" else target.consumer
            seconds = reader + 2 * loads[export.model].bytes / target.disk_write
            yield Around("export", exported(export.call.kind, export.model), seconds)


@dataclass(frozen=True, slots=True)
class _Load:
    """What it takes to run one model on one machine."""

    bytes: int
    layers: int
    packed: bool
    per_token: float
    """Seconds of a forward pass."""

    @classmethod
    def of(cls, model: Model, target: Target) -> _Load:
        cost = count(model, MEAN)
        rate = target.rate(stored(model), width(model))
        packed = any(isinstance(unit, Packed) for _, unit in model.units())
        return cls(cost.bytes, model.layers, packed, cost.flops_per_token / rate)

    def forward(self, tokens: float) -> float:
        return tokens * self.per_token

    def reported(self, texts: Mapping[str, Text], target: Target) -> float:
        """Losses on the first held-out tokens, the latency of a token, the probe of a contract."""
        tokens = sum(min(REPORTED, text.heldout / BYTES_PER_TOKEN) for text in texts.values())
        read = self.bytes / target.bandwidth
        started = STARTED * self.layers * target.overhead
        decoded = COMPILED + DECODED * read if self.packed else DECODED * max(read, started)
        return self.forward(tokens + 2 * PROBED) + decoded
