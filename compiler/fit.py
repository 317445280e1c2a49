"""Which setting makes a stage fit: the smallest change of one argument whose predicted peak is low enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from effc.compiler.method import Method


@dataclass(frozen=True, slots=True)
class Setting:
    written: str
    """As a recipe says it: `accumulate = 4`."""
    peak: int
    """Resident bytes with it."""


def remedy(method: Method, peak: Callable[[Method], int], limit: int) -> Setting | None:
    """The first setting under `limit` bytes, those that keep the result first; None when there is none."""
    for written, changed in _changes(method):
        needed = peak(changed)
        if needed <= limit:
            return Setting(written, needed)
    return None


def _changes(method: Method) -> Iterator[tuple[str, Method]]:
    """Accumulating keeps the gradient and its batch; a smaller batch or fewer samples change the result."""
    batch = getattr(method, "batch", None)
    accumulate = getattr(method, "accumulate", None)
    if accumulate and batch:
        for parts in _doubling(2 * accumulate, batch):
            yield f"accumulate = {parts}", method.model_copy(update={"accumulate": parts})
    for field in ("batch", "samples"):
        value = getattr(method, field, None)
        while isinstance(value, int) and value > 1:
            value //= 2
            yield f"{field} = {value}", method.model_copy(update={field: value})


def _doubling(start: int, last: int) -> Iterator[int]:
    while start <= last:
        yield start
        start *= 2
