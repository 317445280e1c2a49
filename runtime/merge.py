"""Merge models by streaming their tensors from disk, piece by piece; no model is ever built.

Peak memory is a few megabytes a thread, whatever the size of the models; only a tensor that its checkpoint
stores in another arrangement is read whole. A tied tensor is merged once. The result goes into safetensors
files in the stage's work folder (`result_files.py`), which the store takes over as they are; groups of
tensors are the units of the journal.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from effc.compiler.adapters import bare, join, with_adapters
from effc.compiler.checkpoint_write import nbytes
from effc.compiler.method import Context, Journal, Outcome
from effc.compiler.model import Model
from effc.compiler.rewrite import Edit, Rewriter
from effc.compiler.roles import layer_of
from effc.compiler.shapes import Array, Merge, Spot
from effc.compiler.weights import LazyTensor, Stored
from effc.runtime.pieces import Desk, InMemory, OnDisk, Run, finite, not_finite, spans, write
from effc.runtime.result_files import laid_out, lazy, sync
from effc.runtime.stretches import NAMES, Stretches, can, instructions
from effc.specs.diagnostic import Diagnostic, EffcError

UNIT = 256_000_000
"""Bytes of merged tensors between two entries of the journal: about a second of work to repeat."""

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
NOTHING: Array = np.zeros(0)
TOGETHER = 4
"""Pieces that a thread takes at once; handing them out one by one would cost a tenth of the work on them."""
AHEAD = 8
"""Lots of pieces that are waited for at most, so that what they say never piles up."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The same run of numbers of every model, on the desk of the thread that works on it."""

    parts: list[Array]
    base: Array | None
    start: int
    desk: Desk


def merge(method: Merge, models: Sequence[Model], context: Context) -> Outcome:
    """Merge the models; the result has the names, dtypes, config and tokenizer of the first.

    Raises:
        EffcError: E450-E455 for models that do not fit, all at once; E456 for a number that is not finite.
    """
    first = models[0]
    base = context.models.get("base")
    family = [*models, base] if base is not None else list(models)
    told = method.refuses(first, family[1:])
    if problems := [d for d in told if d.severity == "error"]:
        raise EffcError(*_once(problems))
    adapters = method.adapters([with_adapters(model) for model in family])
    models, base = [bare(model) for model in models], bare(base) if base is not None else None
    with ExitStack() as stack:
        folder = context.workdir
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="effc-merge-")))
        pool = stack.enter_context(ThreadPoolExecutor(max(1, min(torch.get_num_threads(), 8))))
        keeper = stack.enter_context(ThreadPoolExecutor(1))
        stream = _Stream(method, list(models), base, context, folder, pool, keeper, stack)
        weights = stream.run()
        if context.workdir is None:
            weights = {name: _held(lazy.read()) for name, lazy in weights.items()}
    log = [Edit("merge", name, f"{len(models)} models") for name in weights]
    rw = Rewriter(_result(models[0], weights), method.kind)
    join(rw, adapters)
    return Outcome(rw.done(), log + rw.log, {"tensors": len(weights)})


@dataclass
class _Stream:
    """One merge under way."""

    method: Merge
    models: list[Model]
    base: Model | None
    context: Context
    folder: Path
    pool: ThreadPoolExecutor
    keeper: ThreadPoolExecutor
    stack: ExitStack
    desks: threading.local = field(default_factory=threading.local)
    rooms: threading.local = field(default_factory=threading.local)
    files: dict[Path, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layout = {name: (tuple(t.shape), t.dtype) for name, t in self.models[0].tensors().items()}

    def run(self) -> dict[str, LazyTensor]:
        layout = self.layout
        homes, fresh = laid_out(self.folder, layout, self.context.names)
        known = self._survey(list(homes)) if self.method.rounds and self.method.over == "model" else None
        journal, kept, done = self.context.journal, None, 0
        for number, names in enumerate(_units({name: nbytes(*layout[name]) for name in homes})):
            unit, files = f"merge-{number:04d}", {homes[name].file for name in names}
            finished = journal is not None and journal.done(unit) and not files & fresh
            for name in names:
                if not finished:
                    self._write(name, homes[name], layout[name][1], known)
                done += 1
                self.context.progress(done, len(homes), "tensors")
            if journal is not None and not finished:
                if kept is not None:
                    kept.result()
                kept = self.keeper.submit(_keep, journal, unit, files, names)
            if self.context.stop():
                raise KeyboardInterrupt
        if kept is not None:
            kept.result()
        return {name: lazy(home, *layout[name]) for name, home in homes.items()}

    def _survey(self, names: Sequence[str]) -> Array:
        """What statistics over the whole model make known."""
        known = NOTHING
        journal = self.context.journal
        if journal is not None and journal.done("merge-survey"):
            return np.array(journal.read("merge-survey")[0]["known"].numpy())
        for number in range(self.method.rounds):
            known = self.method.settle(number, self._round(names, number, known), known)
        if journal is not None:
            journal.save("merge-survey", {"known": torch.from_numpy(known.copy())}, {})
        return known

    def _round(self, names: Sequence[str], number: int, known: Array) -> Iterator[Array]:
        """What the pieces of some tensors say in one round, in their order."""
        for name in names:
            method = self._at(name)
            if (stretches := self._stretches(name)) is not None:
                yield from stretches.observe(number, known, self._aside)
                continue

            def observe(piece: Piece, method: Merge = method) -> Array:
                return method.observe(number, piece.parts, piece.base, known, piece.desk.spare)

            yield from self._each(name, observe)

    def _write(self, name: str, home: Stored, dtype: torch.dtype, known: Array | None) -> None:
        """Merge one tensor to where it goes."""
        method = self._at(name)
        if known is None:
            known = NOTHING
            for number in range(method.rounds):
                known = method.settle(number, self._round([name], number, known), known)
        settled = known
        descriptor = os.open(home.file, os.O_WRONLY)
        try:
            if (stretches := self._stretches(name)) is not None:
                stretches.write(descriptor, home.offset, settled, self._aside)
                return

            def mix(piece: Piece) -> None:
                spot = Spot(name, piece.start)
                out = method.merge(piece.parts, piece.base, settled, piece.desk.spare, spot)
                write(descriptor, home.offset + piece.start * dtype.itemsize, out, DTYPES[dtype], piece.desk)

            for _ in self._each(name, mix):
                pass
        finally:
            os.close(descriptor)

    def _at(self, name: str) -> Merge:
        return self.method.at(layer_of(name), self.models[0].layers)

    def _each(self, name: str, work: Callable[[Piece], Any]) -> Iterator[Any]:
        """Run `work` on every piece of a tensor, side by side; results in the order of the pieces."""
        runs, base = self._runs(name)

        def some(cut: Sequence[tuple[int, int]]) -> list[Any]:
            return [work(self._piece(name, runs, base, span)) for span in cut]

        cuts = spans(runs[0].size)
        lots = (cuts[first : first + TOGETHER] for first in range(0, len(cuts), TOGETHER))
        for found in self._aside(partial(some, lot) for lot in lots):
            yield from found

    def _stretches(self, name: str) -> Stretches | None:
        """The tensor on its way through kernels, where there are some for it."""
        runs, base = self._runs(name)
        every, out = [*runs, base] if base is not None else runs, DTYPES[self.layout[name][1]]
        method, isa = self._at(name), instructions()
        if isa is None or not can(method, every, out):
            return None

        def lost(name: str, number: int) -> None:
            not_finite(name, "the base" if number == len(runs) else f"model {number + 1} of {len(runs)}")

        return Stretches(name, method, every, base is not None, NAMES[out], isa, self.rooms, lost)

    def _aside(self, jobs: Iterable[Callable[[], Any]]) -> Iterator[Any]:
        """Run them side by side; results in their order."""
        waiting: deque[Future[Any]] = deque()
        try:
            for job in jobs:
                if len(waiting) == AHEAD:
                    yield waiting.popleft().result()
                waiting.append(self.pool.submit(job))
            while waiting:
                yield waiting.popleft().result()
        finally:
            wait(waiting)  # nobody writes to a file that is closed, or reads for a merge that failed

    def _runs(self, name: str) -> tuple[list[Run], Run | None]:
        """A tensor of every model, and of the base."""
        runs = [self._run(model, name) for model in self.models]
        return runs, self._run(self.base, name) if self.base is not None else None

    def _run(self, model: Model, name: str) -> Run:
        tensor = model.weights.get(name)
        if tensor is None:
            return InMemory(_numbers(model.tensors()[name]))
        if tensor.stored is None:
            return InMemory(_numbers(tensor.read()))
        file = tensor.stored.file
        if file not in self.files:
            descriptor = os.open(file, os.O_RDONLY)
            self.stack.callback(os.close, descriptor)
            self.files[file] = descriptor
        size = int(np.prod(tensor.shape, dtype=np.int64))
        return OnDisk(self.files[file], tensor.stored.offset, size, DTYPES[tensor.dtype])

    def _piece(self, name: str, runs: Sequence[Run], base: Run | None, span: tuple[int, int]) -> Piece:
        """One piece of every model on this thread's desk, checked for numbers that are not finite."""
        if not hasattr(self.desks, "desk"):
            self.desks.desk = Desk()
        desk: Desk = self.desks.desk
        start, stop = span
        desk.clear(stop - start)
        every = [*runs, base] if base is not None else list(runs)
        arrays = []
        for number, run in enumerate(every, start=1):
            array = desk.spare()
            run.read(start, array, desk)
            if not finite(array):
                which = "the base" if number > len(runs) else f"model {number} of {len(runs)}"
                not_finite(name, which)
            arrays.append(array)
        return Piece(arrays[: len(runs)], arrays[-1] if base is not None else None, start, desk)


def _keep(journal: Journal, unit: str, files: Iterable[Path], names: Sequence[str]) -> None:
    """Put a finished unit on disk while the next one is computed."""
    sync(files)
    journal.save(unit, {}, {"tensors": list(names)})


def _units(sizes: Mapping[str, int]) -> list[list[str]]:
    """The tensors in groups of about UNIT bytes."""
    groups: list[list[str]] = []
    filled = UNIT
    for name, size in sizes.items():
        if filled >= UNIT:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _numbers(tensor: Tensor) -> Array:
    flat: Array = tensor.detach().reshape(-1).float().numpy()
    return flat


def _held(tensor: Tensor) -> LazyTensor:
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def _result(first: Model, weights: Mapping[str, LazyTensor]) -> Model:
    """The first model's structure on meta, with the merged tensors as its weights."""
    model = first.clone()
    model.weights = dict(weights)
    model.release()
    return model


def _once(problems: Sequence[Diagnostic]) -> list[Diagnostic]:
    return list({(item.code, item.title, *item.notes): item for item in problems}.values())
