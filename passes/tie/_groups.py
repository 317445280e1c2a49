"""Layers that use the weights of another: what they share, and what keeps them from sharing."""

from __future__ import annotations

from collections.abc import Sequence

from effc.compiler.blocks.norm import Norm
from effc.compiler.blocks.unit import Unit
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.passes._dense import some
from effc.specs.diagnostic import Diagnostic


def tails(model: Model, layer: int) -> list[str]:
    """Paths inside a layer, of everything that holds weights."""
    head = f"layers.{layer}."
    return [path.removeprefix(head) for path in model.roles if path.startswith(head)]


def form(model: Model, layer: int, tail: str) -> object:
    """What two modules must have alike to share their weights."""
    unit = model.module(f"layers.{layer}.{tail}")
    return unit.spec() if isinstance(unit, Unit) else type(unit)


def unlike(model: Model, layers: Sequence[int]) -> list[Diagnostic]:
    """Layers that would share and do not hold the same modules: the first pair of them."""
    first, *rest = layers
    wanted = {tail: form(model, first, tail) for tail in tails(model, first)}
    for layer in rest:
        mine = tails(model, layer)
        odd = next(
            (t for t in [*wanted, *mine] if t not in mine or form(model, layer, t) != wanted.get(t)), None
        )
        if odd is not None:
            note = f"they differ in {odd}"
            return [Diagnostic("E332", f"layers {first} and {layer} cannot share weights", notes=(note,))]
    return []


def shared_already(kind: str, model: Model, help_: str) -> list[Diagnostic]:
    """Layers that share weights with others before the stage."""
    tied = [alias for alias in model.ties() if alias.startswith("layers.")]
    if not tied:
        return []
    title = f"`{kind}` cannot share layers that share weights already"
    return [Diagnostic("E341", title, notes=(f"{some(tied)} is tied",), help=help_)]


def share(rw: Rewriter, group: Sequence[int], norms: bool) -> None:
    """Every layer of a group computes with the weights of the first; norms stay its own unless `norms`."""
    first, *rest = group
    for layer in rest:
        for tail in tails(rw.model, layer):
            if norms or not isinstance(rw.module(f"layers.{layer}.{tail}"), Norm):
                rw.tie(f"layers.{layer}.{tail}", to=f"layers.{first}.{tail}")
