"""Merge models by streaming their tensors from disk, piece by piece; no model is ever built.

Peak memory is a few megabytes a thread, whatever the size of the models; only a tensor that its checkpoint
stores in another arrangement is read whole. A tied tensor is merged once. Every tensor becomes a safetensors
file of its own in the stage's work folder, which the store takes over; groups of tensors are the units of the
journal.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from effc.compiler.alike import unlike
from effc.compiler.method import Context, Outcome
from effc.compiler.model import Model
from effc.compiler.rewrite import Edit
from effc.compiler.roles import layer_of
from effc.compiler.shapes import Array, Merge
from effc.compiler.weights import LazyTensor, Stored
from effc.runtime.pieces import Desk, InMemory, OnDisk, Run, finite, spans, write
from effc.specs.diagnostic import Diagnostic, EffcError

UNIT = 256_000_000
"""Bytes of merged tensors between two entries of the journal: about a second of work to repeat."""

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
NOTHING: Array = np.zeros(0)


def merge(method: Merge, models: Sequence[Model], context: Context) -> Outcome:
    """Merge the models; the result has the names, dtypes, config and tokenizer of the first.

    Raises:
        EffcError: E450-E455 for models that do not fit, all at once; E456 for a number that is not finite.
    """
    first = models[0]
    base = context.models.get("base")
    family = [*models, base] if base is not None else list(models)
    if problems := [*unlike(method.kind, family, method.template), *method.refuses(first, models[1:])]:
        raise EffcError(*_once(problems))
    with ExitStack() as stack:
        folder = context.workdir
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="effc-merge-")))
        pool = stack.enter_context(ThreadPoolExecutor(max(1, min(torch.get_num_threads(), 8))))
        stream = _Stream(method, list(models), base, context, folder, pool, stack)
        weights = stream.run()
        if context.workdir is None:
            weights = {name: _held(lazy.read()) for name, lazy in weights.items()}
    log = [Edit("merge", name, f"{len(models)} models") for name in weights]
    return Outcome(_result(first, weights), log, {"tensors": len(weights)})


@dataclass
class _Stream:
    """One merge under way."""

    method: Merge
    models: list[Model]
    base: Model | None
    context: Context
    folder: Path
    pool: ThreadPoolExecutor
    stack: ExitStack
    desks: threading.local = field(default_factory=threading.local)
    files: dict[Path, int] = field(default_factory=dict)

    def run(self) -> dict[str, LazyTensor]:
        shapes = {name: tensor for name, tensor in self.models[0].tensors().items()}
        known = self._survey(list(shapes)) if self.method.rounds and self.method.over == "model" else None
        made: dict[str, LazyTensor] = {}
        for number, names in enumerate(_units(shapes)):
            unit = f"merge-{number:04d}"
            finished = self.context.journal is not None and self.context.journal.done(unit)
            for name in names:
                path = self.folder / f"{len(made):05d}.safetensors"
                dtype, shape = shapes[name].dtype, tuple(shapes[name].shape)
                offset = (
                    self._write(name, path, dtype, shape, known) if not finished else _header(dtype, shape)[1]
                )
                made[name] = lazy(path, offset, dtype, shape)
                self.context.progress(len(made), len(shapes), "tensors")
            if self.context.journal is not None and not finished:
                for name in names:
                    _sync(made[name])
                self.context.journal.save(unit, {}, {"tensors": names})
            if self.context.stop():
                raise KeyboardInterrupt
        return made

    def _survey(self, names: Sequence[str]) -> Array:
        """What statistics over the whole model make known."""
        known = NOTHING
        journal = self.context.journal
        if journal is not None and journal.done("merge-survey"):
            return np.array(journal.read("merge-survey")[0]["known"].numpy())
        for number in range(self.method.rounds):
            total: Array | float = 0
            for name in names:
                total = total + self._round(name, number, known)
            known = self.method.settle(number, np.asarray(total), known)
        if journal is not None:
            journal.save("merge-survey", {"known": torch.from_numpy(known.copy())}, {})
        return known

    def _round(self, name: str, number: int, known: Array) -> Array:
        """The statistics of one tensor in one round, added in the order of its pieces."""
        method = self._at(name)

        def observe(runs: Sequence[Run], base: Run | None, span: tuple[int, int]) -> Array:
            parts, below, desk = self._pieces(name, runs, base, span)
            return method.observe(number, parts, below, known, desk.spare)

        total: Array | float = 0
        for part in self._each(name, observe):
            total = total + part
        return np.asarray(total)

    def _write(
        self, name: str, path: Path, dtype: torch.dtype, shape: tuple[int, ...], known: Array | None
    ) -> int:
        """Merge one tensor into a file of its own; the offset of its first byte."""
        method = self._at(name)
        if known is None:
            known = NOTHING
            for number in range(method.rounds):
                known = method.settle(number, self._round(name, number, known), known)
        settled = known
        head, offset = _header(dtype, shape)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.pwrite(descriptor, head, 0)

            def mix(runs: Sequence[Run], base: Run | None, span: tuple[int, int]) -> None:
                parts, below, desk = self._pieces(name, runs, base, span)
                out = method.merge(parts, below, settled, desk.spare)
                write(descriptor, offset + span[0] * dtype.itemsize, out, DTYPES[dtype], desk)

            for _ in self._each(name, mix):
                pass
        finally:
            os.close(descriptor)
        return offset

    def _at(self, name: str) -> Merge:
        return self.method.at(layer_of(name), self.models[0].layers)

    def _each(self, name: str, work: Callable[..., Any]) -> Iterator[Any]:
        """Run `work` on every piece of a tensor, side by side; results in the order of the pieces."""
        runs = [self._run(model, name) for model in self.models]
        base = self._run(self.base, name) if self.base is not None else None
        return self.pool.map(lambda span: work(runs, base, span), spans(runs[0].size))

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

    def _pieces(
        self, name: str, runs: Sequence[Run], base: Run | None, span: tuple[int, int]
    ) -> tuple[list[Array], Array | None, Desk]:
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
                _not_finite(name, which)
            arrays.append(array)
        return arrays[: len(runs)], arrays[-1] if base is not None else None, desk


def lazy(path: Path, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> LazyTensor:
    """The tensor that lies at `offset` of a file."""
    size = int(np.prod(shape, dtype=np.int64))

    def read() -> Tensor:
        with path.open("rb") as file:
            file.seek(offset)
            content = bytearray(file.read(size * dtype.itemsize))
        return (
            torch.frombuffer(content, dtype=dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
        )

    return LazyTensor(shape, dtype, read, Stored(path, offset))


def _units(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """The tensors in groups of about UNIT bytes."""
    groups: list[list[str]] = []
    filled = UNIT
    for name, tensor in tensors.items():
        if filled >= UNIT:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += tensor.numel() * tensor.element_size()
    return groups


def _header(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[bytes, int]:
    """The head of a safetensors file with one tensor, and where its bytes begin."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    table = {"tensor": {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [0, size]}}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + len(text)


def _sync(tensor: LazyTensor) -> None:
    assert tensor.stored is not None
    descriptor = os.open(tensor.stored.file, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


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


def _not_finite(name: str, which: str) -> None:
    raise EffcError(
        Diagnostic(
            "E456",
            f"`{name}` holds a number that is not finite",
            notes=(f"found in {which}",),
            help="that checkpoint is damaged or its training diverged; leave it out",
        )
    )
