"""Labels: which rows of a batch every single number depends on, carried beside the numbers as a graph runs.

Each element of each tensor has an integer of bits: a bit for every row that it depends on, one for random
numbers, and one for each place where rows came together for the first time. What an operation gives depends
on the union of what it read, by the rules of `label_rules`; a rule may name more than is true, never less. So
an output whose elements carry their own row's bit alone is proved not to depend on other rows, whatever the
numbers are. Reference: architectural backdoors for within-batch leaks (arXiv 2505.18323), section on the
information-flow check.

Shapes: labels have the shape of their tensor, int64. B rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from effc.compiler.label_names import WHY

MOST_ROWS = 8
RANDOM = 1 << MOST_ROWS
ROWS = RANDOM - 1
_FIRST_PLACE = MOST_ROWS + 1
MOST_PLACES = 48
"""Places told apart; those beyond share the last bit."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where rows met: the node that was running, the operation, and why."""

    node: str
    op: str
    why: str
    rows: tuple[int, ...] = ()


@dataclass(slots=True)
class Flow:
    """What is known of one run: labels of living tensors, the node that runs, places where rows met."""

    node: str = ""
    places: list[Place] = field(default_factory=list)
    decided: int = 0
    """Bits of a decision of the program that rows took part in; all that is made behind it has them."""
    rows: int | None = None
    """B, once an input is labelled."""
    operations: int = 0
    """Operations of torch that ran."""
    held: Any = field(default_factory=WeakIdKeyDictionary)

    def of(self, tensor: Tensor) -> Tensor:
        """The labels of a tensor; one that nothing labelled depends on no row."""
        found: Tensor | None = self.held.get(tensor)
        if found is None:
            found = torch.zeros_like(tensor, dtype=torch.int64, device="cpu")
            self.held[tensor] = found
        return found

    def put(self, tensor: Tensor, labels: Tensor) -> None:
        """Keep labels; they may be a view of another tensor's, as their tensor may."""
        self.held[tensor] = labels | self.decided if self.decided else labels

    def keep(self, tensor: Tensor, labels: Tensor) -> None:
        """Labels [broadcast] of a fresh tensor, laid out as it is, so that views of both are made alike."""
        own = torch.empty_like(tensor, dtype=torch.int64, device="cpu")
        self.put(tensor, own.copy_(labels))

    def rows_of(self, tensor: Tensor, axis: int = 0) -> None:
        """Label an input: element i along `axis` belongs to row i.

        Raises:
            ValueError: the axis has fewer than two or too many rows.
        """
        count = tensor.shape[axis]
        if not 2 <= count <= MOST_ROWS:
            raise ValueError(f"{count} rows; between 2 and {MOST_ROWS} can be told apart")
        bits = torch.ones(count, dtype=torch.int64) << torch.arange(count)
        self.rows = count
        shape = [1] * tensor.ndim
        shape[axis] = count
        self.put(tensor, bits.view(shape).expand(tensor.shape).clone())

    def place(self, op: str, why: str, rows: Sequence[int]) -> int:
        """The bit of a place; the same node, operation and reason share one."""
        for number, known in enumerate(self.places):
            if (known.node, known.op, known.why) == (self.node, op, why):
                return 1 << (_FIRST_PLACE + min(number, MOST_PLACES - 1))
        self.places.append(Place(self.node, op, why, tuple(rows)))
        return 1 << (_FIRST_PLACE + min(len(self.places), MOST_PLACES) - 1)

    def met(self, op: str, why: str, made: Tensor) -> Tensor:
        """Labels with the bit of this place, where rows meet that met at no place before."""
        fresh = several(made) & (made >> _FIRST_PLACE == 0)
        if not bool(fresh.any()):
            return made
        return torch.where(fresh, made | self.place(op, why, rows_in(made[fresh])), made)

    def crossed(self, op: str, why: str, before: Tensor, after: Tensor) -> Tensor:
        """The same where numbers that stood by rows, in order, stand at another row's place now."""
        if before.ndim == 0 or after.ndim == 0 or before.shape[0] != after.shape[0]:
            return after
        if self.rows is None or before.shape[0] % self.rows:
            return after
        own = self._own(after)
        if bool((before & ROWS & ~self._own(before)).any()) or not bool((before & ROWS).any()):
            return after
        wrong = ((after & ROWS & ~own) != 0) & (after >> _FIRST_PLACE == 0)
        if not bool(wrong.any()):
            return after
        return torch.where(wrong, after | self.place(op, why, rows_in(after[wrong])), after)

    def _own(self, labels: Tensor) -> Tensor:
        """The bit of the row that each element stands at, if the first axis holds rows one after another."""
        assert self.rows is not None
        row = torch.arange(labels.shape[0]) // (labels.shape[0] // self.rows)
        return (torch.ones_like(row) << row).view(-1, *[1] * (labels.ndim - 1))

    def reached(self, labels: Tensor) -> list[Place]:
        """The places whose mixture is in these labels."""
        bits = int(union(labels, None))
        found = range(min(len(self.places), MOST_PLACES))
        return [self.places[n] for n in found if bits >> (_FIRST_PLACE + n) & 1]


def rows_in(labels: Tensor) -> tuple[int, ...]:
    """The rows that labels name."""
    bits = int(union(labels, None))
    return tuple(r for r in range(MOST_ROWS) if bits >> r & 1)


def several(labels: Tensor) -> Tensor:
    """Which elements depend on more than one row."""
    rows = labels & ROWS
    return (rows & (rows - 1)) != 0


def union(labels: Tensor, axes: Sequence[int] | None) -> Tensor:
    """The union along axes (of everything when None); reduced axes stay, with length one."""
    over = list(range(labels.ndim)) if axes is None else [a % max(labels.ndim, 1) for a in axes]
    if axes is None:
        labels, over = labels.reshape(-1), [0]
    if not over or labels.ndim == 0:
        return labels
    out = torch.zeros_like(labels.sum(over, keepdim=True))
    for bit in range(_FIRST_PLACE + MOST_PLACES):
        if bool((part := labels >> bit & 1).any()):
            out |= (part != 0).to(torch.int64).amax(over, keepdim=True) << bit if labels.numel() else 0
    return out.reshape(()) if axes is None else out


@dataclass(slots=True)
class Call:
    """One operation that ran: what it was given and what it gave."""

    name: str
    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    out: Any

    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments, those in lists included."""
        return _tensors((*self.args, *self.kwargs.values()))

    def results(self) -> list[Tensor]:
        return _tensors((self.out,))


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def settle(flow: Flow, call: Call, given: Sequence[Tensor], made: Sequence[Tensor], why: str) -> None:
    """Keep labels of results; those of a written tensor are written in place, so that its views see them."""
    for result, labels in zip(call.results(), made, strict=True):
        labels = flow.met(call.name, WHY[why], labels.expand(result.shape))
        if given:
            labels = flow.crossed(call.name, WHY["move"], given[0], labels)
        if writes(call.func):
            flow.of(result).copy_(labels | flow.decided)
        else:
            flow.keep(result, labels)


def writes(func: Any) -> bool:
    return bool(func._schema.is_mutable)


def everything(labels: Sequence[Tensor]) -> Tensor:
    """The union of everything."""
    bits = torch.zeros((), dtype=torch.int64)
    for one in labels:
        bits = bits | union(one, None) if one.numel() else bits
    return bits


class Labelling(TorchDispatchMode):
    """While it is active, every operation of torch carries labels along."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flow = flow

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from effc.compiler.label_rules import apply, before

        kwargs = kwargs or {}
        self.flow.operations += 1
        given = before(self.flow, func, args, kwargs)
        out = func(*args, **kwargs)
        apply(self.flow, Call(str(func.overloadpacket.__name__), func, args, kwargs, out), given)
        return out
