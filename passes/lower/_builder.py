"""Builder: collects the calls of one program, their buffers and their tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from effc.compiler.model import Model
from effc.kernels.cached_attention.spec import CachedAttentionSpec
from effc.kernels.kernel import KernelSpec
from effc.kernels.linear_attention.spec_c import RecurrentSpec
from effc.kernels.program.call import Call, Plan, Split
from effc.kernels.program.emit import LOGITS
from effc.kernels.recurrent_cell import RecurrentCellSpec
from effc.passes.lower._jobs import Job, Jobs

FLOAT = 4


@dataclass(slots=True)
class Lowered:
    """A program before it is compiled."""

    plan: Plan
    tensors: dict[str, Callable[[], Tensor]]
    """How each tensor is made when the program is loaded."""
    attentions: list[tuple[CachedAttentionSpec | RecurrentSpec | RecurrentCellSpec, Any]]
    """Per cache: its kernel, and the rotary settings of its layer (None without)."""


class Builder:
    """What the kernels of jobs are written into, call by call."""

    def __init__(self, model: Model, jobs: Jobs) -> None:
        self.model, self.jobs = model, jobs
        self.calls: list[Call] = []
        self.widths: dict[str, int] = {}
        self.aliases: dict[str, str] = {}
        self.tensors: dict[str, Callable[[], Tensor]] = {}
        self.attentions: list[tuple[CachedAttentionSpec | RecurrentSpec | RecurrentCellSpec, Any]] = []
        self.names = {number: f"v{number}" for number in jobs.widths}
        self.bytes: dict[tuple[str, int], tuple[str, str, str]] = {}
        """Buffers that hold a value as bytes, by value and width of a group."""
        self.places: dict[str, str] = {}
        """Buffers of choices of experts, and where the rows that they chose stand by expert."""
        self.scores: dict[str, str] = {}
        """Buffers of choices that no expert has used yet, and of the scores that they were made from."""
        self.layer: int | None = None

    def build(self, kernel: Callable[[Builder, Job], None]) -> Lowered:
        """All jobs, each by its kernel; those behind the last layer work on the wanted rows alone."""
        layers = self.jobs.layers()
        last = max((i for i, layer in enumerate(layers) if layer is not None), default=0)
        stream, tail = "", 0
        for i, job in enumerate(self.jobs.jobs):
            if i == last + 1:
                stream, tail = self._gather(job), len(self.calls) - 1
            self.layer = layers[i]
            kernel(self, job)
        self._end_in_logits(self.names[self.jobs.output])
        width, vocab = self.widths[stream] // FLOAT, self.jobs.widths[self.jobs.output]
        plan = Plan(tuple(self.calls), self.widths, stream, width, tail, vocab, self.aliases)
        return Lowered(plan, self.tensors, self.attentions)

    def add(
        self,
        op: str,
        split: Split,
        reads: Sequence[str],
        writes: Sequence[str],
        text: str,
        job: Job,
        tensors: Sequence[str] = (),
        functions: Sequence[str] = (),
        items: str = "M",
        why: str = "",
        specs: Sequence[KernelSpec] = (),
        across: bool = False,
        opens: bool = False,
    ) -> None:
        """Append a call of the layer at hand."""
        self.calls.append(
            Call(
                op, split, tuple(reads), tuple(writes), text, tuple(tensors), tuple(functions), items,
                self.layer, tuple(job.paths), why, tuple(specs), across, opens,
            )
        )  # fmt: skip

    def keep(self, name: str, make: Callable[[], Tensor]) -> str:
        """A tensor of the program, by name; one that is there already serves again."""
        self.tensors.setdefault(name, make)
        return name

    def out(self, job: Job, instead: int | None = None) -> str:
        """The buffer of a job's result; in the place of `instead` if nobody reads that value afterwards."""
        number = job.writes[0]
        name = self.names[number]
        self.widths[name] = self.jobs.widths[number] * FLOAT
        if instead is not None:
            later = self.jobs.jobs[self.jobs.jobs.index(job) + 1 :]
            if not any(instead in j.reads for j in later):
                self.aliases[name] = self.names[instead]
        return name

    def _gather(self, job: Job) -> str:
        """The wanted rows of the stream, for what stands behind the last layer."""
        number = job.reads[0]
        stream, width = self.names[number], self.jobs.widths[number]
        self.names[number] = wanted = f"{stream}w"
        self.widths[wanted] = width * FLOAT
        text = (
            f"for (long m = r0; m < r1; m++) memcpy((float *){{{wanted}}} + m * {width}, "
            f"(const float *){{{stream}}} + a->wanted[m] * {width}, {width * FLOAT});"
        )
        self.calls.append(Call("gather", Split.ROWS, (stream,), (wanted,), text, across=True))
        return stream

    def _end_in_logits(self, final: str) -> None:
        """The last result, and what it is computed in the place of, is the memory that the caller gave."""
        names = {final}
        while final in self.aliases:
            final = self.aliases.pop(final)
            names.add(final)

        def swap(found: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(LOGITS if name in names else name for name in found)

        for name in names:
            self.widths.pop(name)
            self.calls = [replace(c, text=c.text.replace(f"{{{name}}}", f"{{{LOGITS}}}")) for c in self.calls]
        self.calls = [replace(c, reads=swap(c.reads), writes=swap(c.writes)) for c in self.calls]
