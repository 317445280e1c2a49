"""Dense weights: which modules hold them, as rows; refusals and checks that methods on them share."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from math import gcd

import torch
from torch import Tensor, nn

from effc.compiler.blocks.embedding import Embedding
from effc.compiler.blocks.linear import Linear, StackedLinear
from effc.compiler.blocks.planes_linear import PlanesLinear
from effc.compiler.blocks.quant_linear import Packed
from effc.compiler.model import Model
from effc.specs.diagnostic import Diagnostic, EffcError


def inputs_of(module: nn.Module) -> int:
    """The length of a weight row: in_features of a linear, width of a table; 0 for anything else."""
    return int(getattr(module, "in_features", 0) or getattr(module, "width", 0))


def matrix(module: nn.Module) -> Tensor:
    """The weight as rows [R, i]; experts are stacked on top of each other."""
    return module.get_parameter("weight").detach().flatten(0, -2)


def not_dense(kind: str, verb: str, model: Model, paths: Iterable[str]) -> Iterator[Diagnostic]:
    """A diagnostic for selected modules that are packed, and one for those that are dense in no other way."""
    modules = {path: model.module(path) for path in paths}
    packed = [p for p, m in modules.items() if isinstance(m, Packed | PlanesLinear)]
    other = [
        p
        for p, m in modules.items()
        if not isinstance(m, Packed | PlanesLinear | Linear | StackedLinear | Embedding | nn.Linear)
    ]
    if packed:
        yield Diagnostic(
            "E322",
            f"`{kind}` cannot {verb} what is already packed",
            notes=(f"{some(packed)} {'is' if len(packed) == 1 else 'are'} packed",),
            help=f"{verb} before the stage that packs, or leave these modules out with `except`",
        )
    if other:
        types = sorted({type(modules[p]).__name__ for p in other})
        notes = [f"{some(other)}: {', '.join(types)}"]
        advice = f"{verb} before the stage that made them, fold them, or leave them out with `except`"
        if any(f"{p}.base" in shared(model) for p in other):
            notes.append("layers share what lies beneath; folding a difference in would end that")
            advice = f"tie with `lora_rank = 0` to {verb} it, or leave these modules out with `except`"
        yield Diagnostic("E323", f"`{kind}` needs dense weights", notes=tuple(notes), help=advice)


def shared(model: Model) -> set[str]:
    """Paths of modules that share a tensor with another."""
    return {name.rpartition(".")[0] for pair in model.ties().items() for name in pair}


def owner_of(model: Model, path: str) -> str:
    """The name under which the weight at a path is stored; tied weights have one owner."""
    name = f"{path}.weight"
    return model.ties().get(name, name)


def finite(path: str, w: Tensor) -> None:
    """Raises EffcError E420 when a weight is NaN or infinite."""
    if not bool(torch.isfinite(w).all()):
        bad = int((~torch.isfinite(w)).sum())
        raise EffcError(
            Diagnostic(
                "E420",
                f"the weight of {path} is not finite",
                notes=(f"{bad} of {w.numel()} numbers are NaN or infinite",),
                help="repair the checkpoint, or leave the module out with `except`",
            )
        )


def divisors_near(group: int, inputs: Collection[int]) -> list[int]:
    """Up to three divisors of all `inputs`, above 1 and below the least, nearest to `group`, ascending."""
    common = gcd(*inputs)
    divisors = [d for d in range(2, min(inputs)) if common % d == 0]
    return sorted(sorted(divisors, key=lambda d: (abs(d - group), d))[:3])


def some(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return f"{paths[0]}{more}"
