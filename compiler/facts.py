"""Facts, measured: a predicate for every symbolic name that a contract may use.

Checking a recipe reasons with the names alone (`specs/facts.yaml`); after a stage, its promises are measured
here. A region is the list of module paths that a fact speaks of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast

from torch import Tensor, nn

from effc.compiler.blocks.averaged import Averaged
from effc.compiler.blocks.carved import Carved
from effc.compiler.blocks.embedding import Embedding
from effc.compiler.blocks.hashed_linear import HashedLinear
from effc.compiler.blocks.linear import Linear, StackedLinear
from effc.compiler.blocks.lora_linear import LoraLinear
from effc.compiler.blocks.low_rank_linear import LowRankLinear
from effc.compiler.blocks.moe import MoE
from effc.compiler.blocks.norm import Norm
from effc.compiler.blocks.planes_linear import PlanesLinear
from effc.compiler.blocks.quant_linear import Packed
from effc.compiler.blocks.routed_lora import GatedLora, RoutedLora
from effc.compiler.blocks.sparse_low_rank_linear import SparseLowRankLinear
from effc.compiler.blocks.tempered import Tempered
from effc.compiler.contract import Fact
from effc.compiler.formed import FORMED
from effc.compiler.method import Method
from effc.compiler.model import Model
from effc.compiler.presence import known, loaded
from effc.compiler.selects import Selects

Predicate = Callable[[Model, Sequence[str]], bool]


def region(fact: Fact, method: Method | None, model: Model) -> list[str]:
    """The module paths that a fact speaks of: what the method selects, a role, or all that hold weights."""
    if fact.region == "select" and isinstance(method, Selects):
        inside = (path.removesuffix(".base") for path in method.targets(model))
        return [path for path in inside if path in model.roles]
    if fact.region in ("select", "model"):
        return list(model.roles)
    return model.paths(fact.region)


def holds(fact: Fact, model: Model, method: Method | None = None, paths: Iterable[str] | None = None) -> bool:
    """Measure one fact. `paths` is its region where the caller knows it, e.g. from before the stage.

    Raises:
        KeyError: no predicate measures a fact of this name.
    """
    where = region(fact, method, model) if paths is None else [p for p in paths if p in model.roles]
    return PREDICATES[fact.name](model, where)


def facts_of(model: Model) -> dict[str, bool]:
    """Every fact, measured over the whole model."""
    return {name: predicate(model, list(model.roles)) for name, predicate in PREDICATES.items()}


def dense(model: Model, paths: Sequence[str]) -> bool:
    """Weights are plain numbers: neither packed nor factored nor with an adapter beside them."""
    others = Packed | FORMED | LoraLinear | GatedLora | RoutedLora
    return not any(isinstance(model.module(p), others) for p in paths)


def packed(model: Model, paths: Sequence[str]) -> bool:
    """Every weight matrix is stored as packed integers; beneath an adapter, what lies there."""
    held = [model.module(p) for p in paths]
    units = [u.base if isinstance(u, LoraLinear) else u for u in held]
    matrices = [u for u in units if isinstance(u, Packed | Linear | StackedLinear | Embedding | FORMED)]
    return bool(matrices) and all(isinstance(u, Packed) for u in matrices)


def formed(model: Model, paths: Sequence[str]) -> bool:
    """Some linear is computed from other numbers."""
    return any(isinstance(model.module(p), FORMED) for p in paths)


def adapter(model: Model, paths: Sequence[str]) -> bool:
    """Some linear has an adapter beside it."""
    return any(isinstance(model.module(p), LoraLinear) for p in paths)


def beside(kind: type[nn.Module]) -> Predicate:
    """Some linear is inside a unit of this kind."""

    def found(model: Model, paths: Sequence[str]) -> bool:
        return any(isinstance(model.module(p), kind) for p in paths)

    return found


def tied(model: Model, paths: Sequence[str]) -> bool:
    """Some tensor serves more than one place."""
    names = {name for pair in model.ties().items() for name in pair}
    return any(name.startswith(f"{path}.") for path in paths for name in names)


def sparse(model: Model, paths: Sequence[str]) -> bool:
    """Every weight matrix holds zeros."""
    return _all(bool((w == 0).any()) for w in _weights(model, paths))


def carved(model: Model, paths: Sequence[str]) -> bool:
    """Some block is made of slices of a dense one."""
    return any(isinstance(model.module(above), Carved) for path in paths for above in _above(path))


def ensemble(model: Model, paths: Sequence[str]) -> bool:
    """Some block trains several networks and computes with their mean."""
    return any(isinstance(model.module(above), Averaged) for path in paths for above in _above(path))


def mixture(model: Model, paths: Sequence[str]) -> bool:
    """Some block chooses for each token which of its experts run."""
    kinds = MoE | Carved | Tempered
    return any(isinstance(model.module(above), kinds) for path in paths for above in _above(path))


def trainable(model: Model, paths: Sequence[str]) -> bool:
    """Some weight is a floating-point parameter, so a gradient can move it."""
    units = [model.module(p) for p in paths]
    return any(t.is_floating_point() for unit in units for t in unit.parameters())


def unit_gain(model: Model, paths: Sequence[str]) -> bool:
    """Every norm multiplies by one, so it commutes with rotations."""
    norms = [cast(Norm, loaded(model, p)) for p in paths if isinstance(model.module(p), Norm)]
    return bool(norms) and all(bool((norm.weight + norm.offset == 1).all()) for norm in norms)


def sparse_in_groups(n: int, m: int) -> Predicate:
    """In each m neighboring inputs of every row, at most n weights are not zero."""

    def every_group(model: Model, paths: Sequence[str]) -> bool:
        return _all(_in_groups(w, n, m) for w in _weights(model, paths))

    return every_group


PREDICATES: Mapping[str, Predicate] = {
    "adapter": adapter,
    "carved": carved,
    "dense": dense,
    "ensemble": ensemble,
    "formed": formed,
    "gated": beside(GatedLora),
    "hashed": beside(HashedLinear),
    "low_rank": beside(LowRankLinear),
    "mixture": mixture,
    "packed": packed,
    "planes": beside(PlanesLinear),
    "routed": beside(RoutedLora),
    "sparse": sparse,
    "sparse_low_rank": beside(SparseLowRankLinear),
    "sparse_2_4": sparse_in_groups(2, 4),
    "sparse_4_8": sparse_in_groups(4, 8),
    "tied": tied,
    "trainable": trainable,
    "unit_gain": unit_gain,
}
"""Name -> how it is measured."""


def _above(path: str) -> list[str]:
    """The paths of the modules that hold the one at a path."""
    return [path[:i] for i, c in enumerate(path) if c == "."]


def _all(found: Iterable[bool]) -> bool:
    """Whether all are true, and there is one; stops at the first that is not."""
    some = False
    for true in found:
        if not true:
            return False
        some = True
    return some


def _in_groups(w: Tensor, n: int, m: int) -> bool:
    if w.shape[1] % m:
        return False
    return bool(((w.view(w.shape[0], -1, m) != 0).sum(-1) <= n).all())


def _weights(model: Model, paths: Sequence[str]) -> Iterable[Tensor]:
    """The weight matrices [R, i] at paths, packed ones unpacked, one in memory at a time; those that can be
    read from nowhere are left out.
    """
    for path in paths:
        unit: nn.Module = model.module(path)
        plain = isinstance(unit, Linear | StackedLinear | Embedding | nn.Linear)
        if not (plain or isinstance(unit, Packed)) or not known(model, path):
            continue
        held = loaded(model, path)
        if isinstance(held, Packed):
            yield held.dense()
        elif (weight := held.get_parameter("weight")).is_floating_point():
            yield weight.detach().flatten(0, -2)
