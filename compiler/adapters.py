"""Adapters of several models as one: a weighted sum of low-rank changes has the sum of their ranks.

sum_k w_k s_k B_k A_k = [w_1 s_1 B_1, ..., w_n s_n B_n] [A_1; ...; A_n]. The factors themselves are never
averaged: a mean of Bs times a mean of As is another change. Shapes: A [r, i], B [o, r].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from effc.compiler.blocks.lora_linear import LoraLinear
from effc.compiler.formed import FORMED
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.sharing import put
from effc.specs.diagnostic import Diagnostic

Adapters = dict[str, list[tuple[float, LoraLinear]]]
"""By path: each adapter there, behind its share of the sum times its own factor."""


def adapted(model: Model) -> list[str]:
    """Paths of all adapters."""
    return [path for path, unit in model.units() if isinstance(unit, LoraLinear)]


def bare(model: Model) -> Model:
    """The model as it was beneath its adapters; itself where it has none."""
    if not adapted(model):
        return model
    rw = Rewriter(model)
    strip(rw)
    return rw.done()


def strip(rw: Rewriter) -> None:
    """Take every adapter off; what it changed is lost."""
    with rw.together():
        for path in adapted(rw.model):
            rw.swap(path, rw.module(path).base, "adapter taken off")


def join(rw: Rewriter, adapters: Adapters) -> None:
    """Put the sum of adapters over the linears of a bare model. On meta only the structure is made.

    Raises:
        ValueError: the ranks at a path sum to more than its weight has; `unmixable` says so before.
    """
    for path, units in adapters.items():
        lead, first = units[0]
        rank = sum(unit.rank for _, unit in units)
        over = LoraLinear.over(rw.module(path), rank, lead * rank, "rank", first.dropout)
        if not any(unit.a.is_meta for _, unit in units):
            put(over, ["a"], torch.cat([unit.a.detach() for _, unit in units]).to(over.a.dtype))
            b = torch.cat([_scaled(unit.b, factor / lead) for factor, unit in units], 1)
            put(over, ["b"], b.to(over.b.dtype))
        rw.swap(path, over, f"rank {rank}, of {len(units)} adapters")


def adapters_of(models: Sequence[Model], shares: Sequence[float]) -> Adapters:
    """The adapters that count; a model without one at a path adds nothing there."""
    found: Adapters = {}
    for model, share in zip(models, shares, strict=True):
        for path, unit in model.units():
            if isinstance(unit, LoraLinear) and share * unit.factor:
                found.setdefault(path, []).append((share * unit.factor, unit))
    return found


def unmixable(kind: str, models: Sequence[Model], adapters: Adapters, kept: bool) -> list[Diagnostic]:
    """Factors that a merge must not mix number by number: E457. `kept`: the merge can join adapters."""
    found = []
    for number, model in enumerate(models, start=1):
        factored = [path for path, unit in model.units() if isinstance(unit, FORMED)]
        held = factored or ([] if kept else adapted(model))
        if held:
            word = "factors of weights" if factored else "adapters"
            cure = "merge first, then factor the result" if factored else "fold first: `adapt.fold(...)`"
            found.append(
                Diagnostic(
                    "E457",
                    f"`{kind}` cannot mix {word}",
                    notes=(
                        f"model {number} of {len(models)} has {len(held)} of them, the first at `{held[0]}`",
                        "the product of mixed factors is not the mix of their products",
                    ),
                    help=cure,
                    about=f"models[{number - 1}]",
                )
            )
    if kept and (wide := next(_too_wide(adapters), None)) is not None:
        path, rank, most = wide
        found.append(
            Diagnostic(
                "E457",
                f"the adapters that `{kind}` joins at `{path}` are of rank {rank} together",
                notes=(f"a weight there has rank {most} at most",),
                help="fold them first: `adapt.fold(...)` of each model",
            )
        )
    return found


def _too_wide(adapters: Adapters) -> Iterator[tuple[str, int, int]]:
    for path, units in adapters.items():
        rank, unit = sum(u.rank for _, u in units), units[0][1]
        if rank > (most := min(unit.in_features, unit.out_features)):
            yield path, rank, most


def with_adapters(model: Model) -> Model:
    """A clone whose adapters are in memory, whatever else is not; the model itself where it has none."""
    factors = [f"{path}.{name}" for path in adapted(model) for name in ("a", "b")]
    return model.clone().materialize(factors) if factors else model


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    """In float32 unless that is the same; equal shares then change no bit."""
    return tensor.detach() if factor == 1 else tensor.detach().float() * factor
