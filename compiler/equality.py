"""Equality: run two models on the same inputs and measure how far apart they are, whatever they give.

An error is max |after - before| over the range of `before`, the largest of all outputs and calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from effc.compiler.contract import EXACT_FLOAT32, Fidelity
from effc.compiler.model import Model
from effc.compiler.probe import difference, random_ids, widened
from effc.compiler.trace import TracedModel

Call = tuple[Any, ...]
"""The arguments of one run of a model's graph."""

HALF = (torch.float16, torch.bfloat16)


class Stopped(Exception):
    """A graph does not run: the name of the node that raised, and what it raised."""

    def __init__(self, node: str, error: Exception) -> None:
        super().__init__(f"{node}: {type(error).__name__}: {error}")
        self.node = node


def calls(model: Model, given: Iterable[Any] = (), seed: int = 0) -> list[Call]:
    """Probe inputs: `given` (tensors, or tuples of arguments), else two random ones of unequal shape.

    A traced model gets its example inputs, and others of their shapes, kinds and ranges.
    """
    arguments = [one if isinstance(one, tuple) else (one,) for one in given]
    if isinstance(model, TracedModel):
        dice = torch.Generator().manual_seed(seed)
        return arguments or [model.inputs, tuple(_like(value, dice) for value in model.inputs)]
    rows = [ids for (ids, *_) in arguments] or random_ids(model, seed)
    return [(ids, model.step(ids)) for ids in rows]


def run(model: Model, call: Call) -> list[Tensor]:
    """All tensors that a model gives.

    Raises:
        Stopped: a node of the graph raised.
    """
    with torch.no_grad():
        out = _Named(model.gm).run(*call)
    return [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]


def apart(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The largest error; infinite where number or shape of the outputs differ."""
    if len(before) != len(after):
        return float("inf")
    pairs = zip(before, after, strict=True)
    return max((difference(_number(a), _number(b)) for a, b in pairs), default=0.0)


@dataclass(frozen=True, slots=True)
class Measured:
    """How far an edit moved a model, in which arithmetic, and how far it may."""

    error: float
    dtype: str
    limit: float | None

    @property
    def held(self) -> bool:
        return self.limit is None or self.error <= self.limit

    def __str__(self) -> str:
        bound = "no bound" if self.limit is None else f"at most {self.limit:g}"
        return f"{self.error:.2g} of the output range in {self.dtype}, {bound}"


def measured(
    fidelity: Fidelity, before: Model, after: Model, again: Callable[[Model], Model], probes: Sequence[Call]
) -> list[Measured]:
    """The error in every arithmetic in which the contract has a bound; `again` makes the same edit once more.

    EXACT is measured on a float64 clone, where the graph does not round to less, and in float32.
    """
    kinds = {t.dtype for t in before.tensors().values() if t.is_floating_point()}
    own = str(next(iter(kinds), torch.float32)).removeprefix("torch.")
    error = _error(before, after, probes)
    if fidelity.name != "EXACT":
        return [Measured(error, own, fidelity.tolerance)]
    half = bool(kinds & set(HALF))
    found = [_in(torch.float64, fidelity.tolerance, before, again, probes)] if wide_of(before) else []
    found += [_in(torch.float32, EXACT_FLOAT32, before, again, probes)] if half else []
    return [*found, Measured(error, own, None if half else EXACT_FLOAT32)]


def _in(
    dtype: torch.dtype,
    limit: float | None,
    before: Model,
    again: Callable[[Model], Model],
    probes: Sequence[Call],
) -> Measured:
    """The error of the same edit in another dtype, in which new tensors are then too."""
    left = widened(before, dtype)
    error = _error(left, widened(again(left), dtype), cast(probes, dtype))
    return Measured(error, str(dtype).removeprefix("torch."), limit)


def wide_of(model: Model) -> torch.dtype | None:
    """float64; None where foreign code or a written dtype may round in between, so that it proves nothing."""
    if isinstance(model, TracedModel) and model.traced.way == "module":
        return None
    for node in model.gm.graph.nodes:
        if any(isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values())):
            return None
        if node.op == "call_method" and node.target in ("float", "half", "bfloat16"):
            return None
    return torch.float64


def cast(probes: Sequence[Call], dtype: torch.dtype) -> list[Call]:
    """The same calls with floating-point tensors in another dtype."""

    def one(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return [tuple(map(one, call)) for call in probes]


def _error(before: Model, after: Model, probes: Sequence[Call]) -> float:
    return max(apart(run(before, call), run(after, call)) for call in probes)


def _number(tensor: Tensor) -> Tensor:
    return tensor.double() if not tensor.is_floating_point() else tensor


def _like(value: Any, dice: torch.Generator) -> Any:
    """Another value of the same shape and range; what is no tensor stays."""
    if not isinstance(value, Tensor) or not value.numel() or value.is_complex():
        return value
    if value.dtype == torch.bool:
        return torch.rand(value.shape, generator=dice) < 0.5
    if not value.is_floating_point():
        low, high = int(value.min()), int(value.max())
        return torch.randint(low, high + 1, value.shape, generator=dice, dtype=value.dtype)
    spread = float(value.double().std()) if value.numel() > 1 else 0.0
    noise = torch.randn(value.shape, generator=dice, dtype=torch.float64)
    return (float(value.double().mean()) + (spread or 1.0) * noise).to(value.dtype)


class _Named(fx.Interpreter):
    """Runs a graph; an error says at which node."""

    def run_node(self, n: fx.Node) -> Any:
        try:
            return super().run_node(n)
        except Stopped:
            raise
        except Exception as error:
            raise Stopped(str(n.target) if n.op == "call_module" else n.name, error) from error
