"""What does not fit into memory or onto the disk, and the smallest change of an argument that helps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from effc.compiler.method import Method
from effc.compiler.placed import placed
from effc.specs.diagnostic import Diagnostic, Label
from effc.specs.recipe import Binding, Expect
from effc.specs.target import Target
from effc.specs.units import fmt_bytes


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


def too_large(binding: Binding, method: Method, peak: Callable[[Method], int], target: Target) -> Diagnostic:
    """E351 at a stage whose `peak` (resident bytes, by method) is above the memory of the target."""
    needed, has = fmt_bytes(peak(method)), fmt_bytes(target.memory_bytes)
    setting = remedy(method, peak, target.memory_bytes)
    notes = (f"it would need {needed}; `{target.name}` has {has}",)
    if setting is None:
        advice = f"no setting of `{method.kind}` makes it fit; take a machine with {needed} of memory"
    else:
        advice = f"write `{setting.written}`; then it needs {fmt_bytes(setting.peak)}"
    about = setting.written.partition(" ")[0] if setting else ""
    title = f"`{binding.name}` does not fit into memory"
    return placed(Diagnostic("E351", title, (), notes, advice, about=about), binding.call)


def untimed(
    expects: Iterable[Expect], nbytes: Mapping[str, int], memory: int, rest: int = 0
) -> list[Diagnostic]:
    """E351 for each `expect` on the latency of a model that memory cannot hold beside the rest.

    `nbytes` are those of the models by name. A model that is read from disk block by block has no
    latency of its own to be timed.
    """
    found = []
    for expect in expects:
        for name in dict.fromkeys(m.model for m in expect.metrics() if m.metric == "latency"):
            needed = nbytes.get(name, 0) + rest
            if needed > memory:
                found.append(
                    Diagnostic(
                        "E351",
                        f"the latency of `{name}` cannot be timed where `{name}` does not fit into memory",
                        (Label(expect.span),) if expect.span else (),
                        (f"it would need {fmt_bytes(needed)}; there are {fmt_bytes(memory)}",),
                        f"expect `{name}.bytes` or `{name}.flops` instead, or take a machine with "
                        f"{fmt_bytes(needed)} of memory",
                    )
                )
    return found


def disk_full(recipe: str, results: Mapping[str, int], free: int) -> Diagnostic:
    """E352 for results, stage -> bytes, that need more than is free."""
    largest = max(results, key=lambda name: results[name])
    return Diagnostic(
        "E352",
        f"the store of `{recipe}` does not fit on the disk",
        notes=(
            f"results take {fmt_bytes(sum(results.values()))}, {fmt_bytes(free)} are free",
            f"the largest is `{largest}` with {fmt_bytes(results[largest])}",
        ),
        help="free space with `effc cache gc`, or choose a place with `--store elsewhere`",
    )
