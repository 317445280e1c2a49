"""Jobs of mixtures: routing, the experts' matrices on the rows that chose them, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from effc.compiler.flat import FlatOp
from effc.passes.lower._jobs import Combine, Experts, Normalize, Route
from effc.passes.lower._reading import Reading


def _route(read: Reading, flat: FlatOp) -> None:
    """route, temper: the weights and numbers of a row's experts, from the scores of all."""
    scores = read.value(flat.op.takes[0])
    count = read.width(scores)
    given: dict[str, Any] = dict(flat.op.attributes)
    if flat.op.name == "temper":
        given |= {"form": "above", "active": count}
    else:
        given |= {"form": "best"}
    weights, chosen = flat.op.gives
    read.widths[chosen] = given["active"]
    read.add(Route([scores], [weights, chosen], [flat.path], experts=count, **given), given["active"])


def _largest(read: Reading, flat: FlatOp) -> None:
    scores = read.value(flat.op.takes[0])
    count = read.width(scores)
    job = Route([scores], list(flat.op.gives), [flat.path], form="largest", experts=count, active=1)
    read.add(job, 1)


def _tell(read: Reading, flat: FlatOp) -> None:
    """x goes on as it is; what is told of its rows is kept under its name."""
    x, _, value = flat.op.takes
    read.same[flat.op.gives[0]] = read.value(x)
    read.told[str(flat.op.attributes["side"])] = read.value(value)


def _told(read: Reading, flat: FlatOp) -> None:
    read.same[flat.op.gives[0]] = read.told[str(flat.op.attributes["side"])]


def _spread(read: Reading, flat: FlatOp) -> None:
    """Copies are made where experts need them, by expert."""
    read.copied[flat.op.gives[0]] = read.value(flat.op.takes[0])


def _expert_linear(read: Reading, flat: FlatOp) -> None:
    x, weight, chosen = flat.op.takes
    choice, matrix, out = read.value(chosen), read.matrix(weight), flat.op.gives[0]
    active = read.width(choice)
    source = read.copied.get(read.value(x), read.value(x))
    job = Experts(
        [source, choice], [out], [matrix.unit], matrices=[matrix], active=active,
        placed=read.value(x) not in read.copied,
    )  # fmt: skip
    read.choices[out] = choice
    read.add(job, matrix.rows * active)


def _combine(read: Reading, flat: FlatOp) -> None:
    """combine, first_copy: what a row's experts gave, added up."""
    y = read.value(flat.op.takes[0])
    reads = [y, read.choices[y], *(read.value(n) for n in flat.op.takes[1:])]
    active = read.width(reads[1])
    job = Combine(reads, list(flat.op.gives), [flat.path], active=active, weighted=len(reads) > 2)
    read.add(job, read.width(y) // active)


def _standardize(read: Reading, flat: FlatOp) -> None:
    x = read.value(flat.op.takes[0])
    job = Normalize([x], list(flat.op.gives), [flat.path], weight=None, form="layer", eps=1e-5)
    read.add(job, read.width(x))


MIXTURES: Mapping[str, Callable[[Reading, FlatOp], None]] = {
    "route": _route,
    "temper": _route,
    "largest": _largest,
    "tell": _tell,
    "told": _told,
    "spread": _spread,
    "expert_linear": _expert_linear,
    "combine": _combine,
    "first_copy": _combine,
    "standardize": _standardize,
}
