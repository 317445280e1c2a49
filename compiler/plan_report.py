"""The plan of an analysis: what it takes, for it makes no model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from effc.compiler.effort import peak_of, seconds_of
from effc.compiler.model import Model
from effc.compiler.placed import placed
from effc.specs.diagnostic import Diagnostic
from effc.specs.recipe import Binding
from effc.specs.target import Target

if TYPE_CHECKING:
    from effc.compiler.plan import Staged


@dataclass(frozen=True, slots=True)
class ReportPlan:
    """What an analysis will take; it makes no model."""

    name: str
    method: str
    inputs: tuple[str, ...]
    peak_bytes: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "method": self.method,
            "inputs": list(self.inputs),
            "peak_bytes": self.peak_bytes,
            "seconds": self.seconds,
        }


def reported(
    binding: Binding,
    staged: Staged,
    models: Mapping[str, Model],
    target: Target,
    text: int,
    problems: list[Diagnostic],
) -> Iterator[ReportPlan]:
    """What an analysis takes beside `text` bytes of open data; what it refuses goes to `problems`."""
    source = models.get(staged.models[0])
    if source is None:  # what it is about was refused already
        return
    told = [placed(d, binding.call) for d in staged.method.refuses(source, ())]
    problems += told
    if any(d.severity == "error" for d in told):
        return
    work = staged.method.work(source, staged.seq)
    peak = peak_of(staged.method, source, work, target, text)
    seconds = seconds_of(staged.method, source, work, target)
    yield ReportPlan(binding.name, binding.call.kind, staged.models, peak, seconds)
