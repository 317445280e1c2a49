"""Probe: run a model before and after a stage on the same inputs; the difference against the contract.

Shapes: ids [B, T]; outputs [B, T, V]. An error is max |after - before| over the range of `before`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effc.compiler.blocks import PatchEmbed
from effc.compiler.contract import EXACT_FLOAT32, Contract
from effc.compiler.facts import facts_of, holds
from effc.compiler.method import Method
from effc.compiler.model import Model
from effc.compiler.presence import computed_each
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Rewrite

SHAPES = ((2, 24), (1, 7))
"""Two unequal batch sizes and lengths of random probe inputs."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What was measured about one stage."""

    fidelity: str
    """The contract in words."""
    limit: float | None
    error: float
    """Largest error over all probe inputs, in the model's own dtype."""
    error_float64: float | None
    """The same where the stage edits a float64 clone of the model; measured for EXACT alone."""
    error_float32: float | None
    """The same on a float32 clone: rounding to half precision is the dtype's error, not the stage's."""
    broken: tuple[str, ...]
    """Promised facts that do not hold."""
    facts: Mapping[str, bool]
    """Every fact about the model after the stage."""

    @property
    def held(self) -> bool:
        """Whether the contract was kept."""
        if self.broken:
            return False
        if self.error_float64 is not None:
            return self.error_float64 <= (self.limit or 0.0) and (self.error_float32 or 0.0) <= EXACT_FLOAT32
        return self.limit is None or self.error <= self.limit

    def as_json(self) -> dict[str, Any]:
        return {
            "fidelity": self.fidelity,
            "limit": self.limit,
            "error": self.error,
            "error_float64": self.error_float64,
            "error_float32": self.error_float32,
            "broken": list(self.broken),
            "facts": dict(self.facts),
            "held": self.held,
        }


def probe(
    method: Method, before: Model, after: Model, heldout: Sequence[Tensor] = (), seed: int = 0
) -> Probe:
    """Measure the contract of `method` on random ids and on `heldout` ids [B, T].

    A model whose weights are on disk is read block by block. EXACT is measured on wider clones, which hold
    the whole model.
    """
    contract = method.contract
    inputs = [*random_ids(before, seed), *heldout]
    exact = contract.fidelity.name == "EXACT"
    with torch.no_grad():
        outputs = zip(_answers(before, inputs), _answers(after, inputs), strict=True)
        error = max(difference(left, right) for left, right in outputs)
        wide = _error_in(torch.float64, method, before, after, inputs) if exact else None
        single = _error_in(torch.float32, method, before, after, inputs) if exact else None
    return Probe(
        str(contract.fidelity),
        contract.fidelity.tolerance,
        error,
        wide,
        single,
        tuple(broken(method, before, after, contract)),
        facts_of(after),
    )


def _answers(model: Model, inputs: Sequence[Tensor]) -> Iterator[Tensor]:
    """What a model computes on each input."""
    if model.is_meta:
        return computed_each(model, [(ids, model.step(ids)) for ids in inputs])
    return (model(ids) for ids in inputs)


def broken(method: Method, before: Model, after: Model, contract: Contract) -> list[str]:
    """Facts that the contract gives, whose condition is met, and that do not hold after the stage."""
    return [str(f) for f in contract.gives if f.applies(method) and not holds(f, after, method)]


def random_ids(model: Model, seed: int) -> list[Tensor]:
    """Token ids of the model's vocabulary, in two shapes; images for a model that takes them."""
    embedding = model.module("embedding")
    stream = torch.Generator().manual_seed(seed)
    if isinstance(embedding, PatchEmbed):
        size = embedding.channels, embedding.image, embedding.image
        return [torch.randn(rows, *size, generator=stream) for rows, _ in SHAPES]
    vocabulary = int(getattr(embedding, "vocab", 2))
    return [torch.randint(0, vocabulary, shape, generator=stream) for shape in SHAPES]


def difference(before: Tensor, after: Tensor) -> float:
    """max |after - before| over the range of `before`; infinite when shapes differ or a number is NaN."""
    if before.shape != after.shape or not bool(torch.isfinite(after).all()):
        return float("inf")
    left, right = before.double(), after.double()
    span = float(left.max() - left.min())
    gap = float((right - left).abs().max())
    return gap / span if span > 0 else (0.0 if gap == 0 else float("inf"))


def _error_in(
    dtype: torch.dtype, method: Method, before: Model, after: Model, inputs: Sequence[Tensor]
) -> float:
    """The error of the same stage on clones in `dtype`."""
    left = widened(before, dtype)
    right = _again(method, left) if isinstance(method, Rewrite) else widened(after, dtype)
    return max(difference(left(ids), right(ids)) for ids in inputs)


def _again(method: Rewrite, model: Model) -> Model:
    """The same edit in this model's dtype: rounding to a narrower one is no error of the stage."""
    rw = Rewriter(model, method.kind)
    method.rewrite(rw)
    return rw.done()


def widened(model: Model, dtype: torch.dtype = torch.float64) -> Model:
    """A clone whose floating-point tensors are of `dtype`."""
    clone = model.clone()
    for name, tensor in clone.materialize().tensors().items():
        if tensor.is_floating_point():
            clone.place(name, tensor.to(dtype))
    return clone
