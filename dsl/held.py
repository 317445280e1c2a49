"""What holds of a model: the facts that stages gave it, and what a further stage leaves of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from effc.dsl.region import Region, region_of
from effc.specs.catalogue import Entry
from effc.specs.facts import claim, facts
from effc.specs.recipe import Binding, Call


@dataclass(frozen=True, slots=True)
class Held:
    """A fact that a stage gave to a region."""

    fact: str
    region: Region
    by: str


State = tuple[Held, ...]


def loaded(binding: Binding) -> State:
    """A model just loaded is dense; one with an adapter has it."""
    return (Held("adapter", Region(), binding.name),) if binding.call.kind == "adapter" else ()


def after(binding: Binding, entry: Entry, before: Sequence[State]) -> State:
    """What holds after a stage: what every input had and it keeps, and what it gives."""
    kept = {claim(text).fact for text in entry.keeps}
    broken = {claim(text).fact for text in entry.breaks}
    given = [c for c in map(claim, entry.gives) if c.applies(arguments_of(binding.call, entry))]
    state = [held for held in shared(before) if held.fact not in broken and survives(held, entry, kept)]
    if any(c.fact == "dense" for c in given):  # folds and dequantizers give dense weights back
        state = [held for held in state if "dense" not in facts()[held.fact].excludes]
    return (*state, *(Held(c.fact, region_of(c, binding.call), binding.name) for c in given))


def survives(held: Held, entry: Entry, kept: set[str]) -> bool:
    return held.fact in kept or facts()[held.fact].of == "structure" or entry.contract == "EXACT"


def shared(before: Sequence[State]) -> State:
    """Facts of any of the models; those that one stage gave, the most telling first."""
    found = dict.fromkeys(held for state in before for held in state)
    return tuple(sorted(found, key=lambda held: -len(facts()[held.fact].implies)))


def arguments_of(call: Call, entry: Entry) -> dict[str, Any]:
    """What is given and, where nothing is, the defaults."""
    return {**{p.name: p.default for p in entry.parameters}, **call.arguments}
