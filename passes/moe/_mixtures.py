"""Mixtures that are there already: which a method finds, and others with the same weights in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from effc.compiler.blocks.moe import MoE
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.passes._dense import some
from effc.specs.diagnostic import Diagnostic


def mixtures_in(model: Model) -> dict[str, MoE]:
    """Path -> block, by layer; a block of another kind than MoE itself is left out."""
    return {path: unit for path, unit in model.units() if type(unit) is MoE}


def none_found(kind: str, model: Model) -> list[Diagnostic]:
    """The diagnostic for a model without a mixture."""
    if mixtures_in(model):
        return []
    help_ = "make mixtures first with moe.upcycle"
    return [Diagnostic("E320", f"`{kind}` finds no mixture of experts in the model", help=help_)]


def changes(model: Model, wanted: Mapping[str, Any]) -> list[str]:
    """Paths of the mixtures of which some argument has another value."""
    return [
        path
        for path, unit in mixtures_in(model).items()
        if any(getattr(unit, key) != value for key, value in wanted.items())
    ]


def unchanged(kind: str, model: Model, wanted: Mapping[str, Any]) -> list[Diagnostic]:
    """The diagnostic for a stage after which every mixture would be as it was."""
    if changes(model, wanted) or not mixtures_in(model):
        return []
    note = f"{some(list(mixtures_in(model)))} have these settings already"
    return [Diagnostic("E325", f"`{kind}` would change nothing", notes=(note,), help="leave the stage out")]


def reset(rw: Rewriter, paths: Sequence[str], wanted: Mapping[str, Any], detail: str) -> None:
    """Give mixtures other arguments; router and experts stay the ones they are."""
    with rw.together():
        for path in paths:
            old = rw.module(path)
            new = MoE.from_spec(old.spec() | dict(wanted))
            new._modules.update(old._modules)
            rw.swap(path, new, detail)
