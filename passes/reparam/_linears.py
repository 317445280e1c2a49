"""Single linears that a method puts in another form: refusals, and the bias that stays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from typing import TypeVar

import torch
from torch import nn

from effc.compiler.blocks.linear import Linear
from effc.compiler.blocks.unit import Unit
from effc.compiler.model import Model
from effc.passes._dense import not_dense, shared, some
from effc.specs.diagnostic import Diagnostic

Made = TypeVar("Made", bound=Unit)


def dtype_of(module: nn.Module) -> str:
    """The word for the dtype of a linear's weight."""
    return str(module.get_parameter("weight").dtype).removeprefix("torch.")


def with_bias(unit: Made, module: nn.Module) -> Made:
    """The unit with the bias of the linear whose place it takes."""
    unit.register_parameter("bias", module._parameters.get("bias"))
    return unit


def dice_of(seed: int, path: str) -> torch.Generator:
    """What is drawn for a module depends on the seed and its path alone."""
    digest = sha256(f"{seed}/{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def single(model: Model, paths: Iterable[str]) -> list[str]:
    """Those that are dense linears on their own: no tables, no experts."""
    return [p for p in paths if isinstance(model.module(p), Linear | nn.Linear)]


def not_single(kind: str, verb: str, model: Model, paths: Mapping[str, object]) -> Iterator[Diagnostic]:
    """What is not dense, or dense and not a linear on its own."""
    found = list(not_dense(kind, verb, model, paths))
    yield from found
    fit = set(single(model, paths))
    if not found and (odd := [p for p in paths if p not in fit]):
        types = sorted({type(model.module(p)).__name__ for p in odd})
        yield Diagnostic(
            "E323",
            f"`{kind}` {verb}s single linears only",
            notes=(f"{some(odd)}: {', '.join(types)}",),
            help="leave these modules out with `except`",
        )


def not_shared(kind: str, verb: str, model: Model, paths: Iterable[str], help_: str) -> Iterator[Diagnostic]:
    """Weights that another module uses too."""
    tied = shared(model)
    if common := [path for path in paths if path in tied]:
        yield Diagnostic(
            "E341",
            f"`{kind}` cannot {verb} a weight that is shared",
            notes=(f"{some(common)} shares its weight with another module",),
            help=help_,
        )


def not_fresh(kind: str, model: Model, keep: str) -> Iterator[Diagnostic]:
    """A model that has learned something, which new weights would throw away."""
    if model.facts.get("learned"):
        yield Diagnostic(
            "E327",
            f"`{kind}` would throw away what the model has learned",
            notes=("its weights come from a file or a training, and init = scratch draws others",),
            help=f"write {keep}, or begin with a fresh model: new(llama, ...)",
            about="init",
        )
