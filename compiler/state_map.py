"""State map: a state dict carried over the edits of a rewriter, forth and back.

Every tensor that a model held at any time during the edits has a number. `after` says how a tensor follows
from earlier ones, `before` how an earlier one follows from later ones; one that only moved keeps its number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from effc.specs.diagnostic import Diagnostic, EffcError

if TYPE_CHECKING:
    from effc.compiler.model import Model

State = Mapping[str, Tensor]
Step = tuple[Callable[..., Tensor], tuple[int, ...]]
"""A function and the numbers of the tensors it takes."""


class Past(NamedTuple):
    """What a rewriter remembers of a tensor: its name in the model that came in, if any, and its number."""

    origin: str | None
    number: int


class Value(NamedTuple):
    """A tensor as it is at one moment of the edits, for `derive` and `recover`."""

    tensor: Tensor
    number: int


@dataclass(slots=True)
class Ledger:
    """Written by the rewriter as it edits."""

    count: int = 0
    after: dict[int, Step] = field(default_factory=dict)
    before: dict[int, list[Step]] = field(default_factory=dict)
    """Several ways where copies were written apart; they must agree."""
    settled: set[int] = field(default_factory=set)
    """Numbers whose way back a rule gave itself."""
    made_by: dict[int, str] = field(default_factory=dict)
    """Number -> the edit that made a tensor out of nothing that is known."""

    def fresh(self, made_by: str = "") -> int:
        self.count += 1
        if made_by:
            self.made_by[self.count] = made_by
        return self.count

    def becomes(self, old: int, new: int) -> None:
        """Another tensor stands in the place of an earlier one: the way back is to take it."""
        if old not in self.settled and old != new:
            self.before.setdefault(old, []).append((same, (new,)))


def same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True, slots=True)
class StateMap:
    """Between the state dict of a model and that of the model that edits made of it."""

    source: Mapping[str, int]
    """Names in the model that came in (those of tied tensors included) -> number."""
    result: Mapping[str, int]
    """Names in the edited model -> number."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of the tensors that came in."""
    ledger: Ledger

    @property
    def names(self) -> dict[str, str]:
        """Name now -> name before, of all tensors that are the same; a name that was tied stands for all."""
        first: dict[int, str] = {}
        for name, number in self.source.items():
            first.setdefault(number, name)
        return {name: first[number] for name, number in self.result.items() if number in first}

    @property
    def lost(self) -> tuple[str, ...]:
        """Names before that follow from nothing in the edited model: removed layers, rounded weights."""
        held = set(self.result.values())
        return tuple(name for name, number in self.source.items() if not self._can(number, held, back=True))

    @property
    def opaque(self) -> tuple[str, ...]:
        """Names now that do not follow from the state dict before: what was written and not derived."""
        held = set(self.source.values())
        return tuple(name for name, number in self.result.items() if not self._can(number, held, back=False))

    def forward(self, state: State) -> dict[str, Tensor]:
        """The state dict of the edited model that belongs to one of the model before.

        Raises:
            EffcError: E413 when a tensor is missing or of another shape, or one of the edited model does not
                follow from them.
        """
        self._complete(state)
        known = {number: state[name] for name, number in self.source.items() if name in state}
        found: dict[str, Tensor] = {}
        for name, number in self.result.items():
            tensor = self._after(number, known)
            if tensor is None:
                made = self.ledger.made_by.get(number, "an edit")
                raise EffcError(
                    Diagnostic(
                        "E413",
                        f"`{name}` does not follow from the state dict of the model before",
                        notes=(f"made by {made}",),
                        help="write it with rw.derive(path, name, function, value), or run the rules again",
                    )
                )
            found[name] = tensor
        return found

    def back(self, state: State, rest: State | None = None) -> dict[str, Tensor]:
        """A state dict of the model before that computes what `state` does in the edited model.

        What follows from nothing there (removed layers) is taken from `rest`.

        Raises:
            EffcError: E413 when a tensor follows from nothing, or several that stand for one of the model
                before differ.
        """
        held: dict[int, dict[str, Tensor]] = {}
        for name, number in self.result.items():
            if name in state:
                held.setdefault(number, {})[name] = state[name]
        known: dict[int, Tensor | None] = {}
        found: dict[str, Tensor] = {}
        for name, number in self.source.items():
            tensor = self._before(name, number, held, known)
            if tensor is None and rest is not None:
                tensor = rest.get(name)
            if tensor is None:
                lost = self.lost
                notes = (f"{len(lost)} names are lost, the first: {', '.join(lost[:3])}",) if lost else ()
                raise EffcError(
                    Diagnostic(
                        "E413",
                        f"`{name}` follows from nothing in the state dict",
                        notes=notes,
                        help="give what is lost: map.back(state, rest=state_of_the_model_before)",
                    )
                )
            found[name] = tensor
        return found

    def load(self, model: Model, state: State) -> Model:
        """The edited model with numbers that belong to `state` of the model before; `model` stays as it is.

        Raises: as `forward`.
        """
        clone = model.clone()
        ties = clone.ties()
        for name, tensor in self.forward(state).items():
            if name not in ties:
                clone.place(name, tensor)
        return clone

    def then(self, later: StateMap) -> StateMap:
        """This map, and then that of edits to the model it led to."""
        base = self.ledger.count
        moved = {number: number + base for number in range(1, later.ledger.count + 1)}
        moved |= {number: self.result[name] for name, number in later.source.items() if name in self.result}
        mine, theirs = self.ledger, later.ledger

        def renumbered(step: Step) -> Step:
            return step[0], tuple(moved[n] for n in step[1])

        ledger = Ledger(
            base + theirs.count,
            mine.after | {moved[n]: renumbered(step) for n, step in theirs.after.items()},
            {n: list(steps) for n, steps in mine.before.items()},
            mine.settled | {moved[n] for n in theirs.settled},
            mine.made_by | {moved[n]: word for n, word in theirs.made_by.items()},
        )
        for number, steps in theirs.before.items():
            ledger.before.setdefault(moved[number], []).extend(map(renumbered, steps))
        result = {name: moved[number] for name, number in later.result.items()}
        return StateMap(self.source, result, self.shapes, ledger)

    def _complete(self, state: State) -> None:
        given = {self.source[name] for name in state if name in self.source}
        for name, number in self.source.items():
            if number not in given:
                raise EffcError(
                    Diagnostic("E413", f"the state dict lacks `{name}`", help="give that of the whole model")
                )
            if name in state and tuple(state[name].shape) != self.shapes[name]:
                title = f"`{name}` is {list(state[name].shape)}, not {list(self.shapes[name])}"
                raise EffcError(
                    Diagnostic("E413", title, help="give the state dict of a model of the same structure")
                )

    def _after(self, number: int, known: dict[int, Tensor]) -> Tensor | None:
        """A tensor by its number, computed from earlier ones; None where it follows from nothing."""
        if number not in known and number in self.ledger.after:
            function, taken = self.ledger.after[number]
            parts = [part for n in taken if (part := self._after(n, known)) is not None]
            if len(parts) == len(taken):
                with torch.no_grad():
                    known[number] = function(*parts)
        return known.get(number)

    def _before(
        self,
        name: str,
        number: int,
        held: Mapping[int, Mapping[str, Tensor]],
        known: dict[int, Tensor | None],
    ) -> Tensor | None:
        """A tensor by its number, computed from later ones; all ways that there are must agree."""
        if number in known:
            return known[number]
        ways = dict(held.get(number, {}))
        for function, taken in self.ledger.before.get(number, ()):
            parts = [part for n in taken if (part := self._before(name, n, held, known)) is not None]
            if len(parts) == len(taken):
                with torch.no_grad():
                    ways[self._said(taken)] = function(*parts)
        first = next(iter(ways), None)
        for other, tensor in ways.items():
            if first is not None and not torch.equal(ways[first], tensor):
                raise EffcError(
                    Diagnostic(
                        "E413",
                        f"`{first}` and `{other}` both stand for `{name}` of the model before, and differ",
                        help="no state dict of that model computes the same; keep them tied while training",
                    )
                )
        known[number] = ways[first] if first is not None else None
        return known[number]

    def _said(self, numbers: tuple[int, ...]) -> str:
        """Names of tensors in the edited model, as far as they are there."""
        names = [name for name, number in self.result.items() if number in numbers]
        return ", ".join(names) or f"an edit ({numbers})"

    def _can(self, number: int, held: set[int], back: bool) -> bool:
        """Whether a tensor follows from those that are held."""
        if number in held:
            return True
        after = [self.ledger.after[number]] if number in self.ledger.after else []
        ways = self.ledger.before.get(number, []) if back else after
        return any(all(self._can(n, held, back) for n in taken) for _, taken in ways)
