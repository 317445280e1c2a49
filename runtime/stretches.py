"""Merge by kernels: stretches of numbers as they are stored, read, handed to C and written, side by side.

A stretch is a few pieces of one tensor of every model. The C is compiled for the dtypes at hand; where there
is no compiler, or a tensor is stored in another dtype, the merge's own numpy does the same (`merge.py`).
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Literal, TypeVar

import numpy as np

from effc.compiler.shapes import Array, Merge
from effc.kernels.cpu.build import compiler
from effc.kernels.cpu.entry import compiled
from effc.kernels.cpu.isa import Isa, available
from effc.kernels.cpu.stored import Stored
from effc.kernels.merge import counts, dots, mix
from effc.kernels.merge.asked import Join, Keep, Look, Looking, Mix, Mixing
from effc.kernels.merge.draws import key_of
from effc.runtime import pieces
from effc.runtime.pieces import InMemory, OnDisk, Run
from effc.specs.diagnostic import EffcError

T = TypeVar("T")
Aside = Callable[[Iterable[Callable[[], T]]], Iterator[T]]
"""Runs work side by side; results in its order."""
Lost = Callable[[str, int], None]
"""Told of the tensor and the input that hold a number that is not finite; raises."""

NAMES: dict[str, Stored] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""safetensors dtype -> what the kernels call it."""
WIDTH: dict[Stored, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
LINE = 64
"""Bytes of a cache line; vectors that begin there are loaded in one go."""
_WORD = 0xFFFFFFFFFFFFFFFF


Entry = tuple[Callable[..., None], tuple[str, ...]]
"""A kernel, and the names of its arguments in order."""


@cache
def instructions() -> Isa | None:
    """What kernels of merges are compiled for; None where they cannot be."""
    if sys.byteorder != "little" or compiler() is None:
        return None
    try:
        _mix(("float32",), None, "float32", "sum", "all", available()[0])
    except (EffcError, OSError):  # a compiler that does not work, or a cache that cannot be loaded from
        return None
    return available()[0]


@cache
def _mix(
    models: tuple[Stored, ...], base: Stored | None, out: Stored, join: Join, keep: Keep, isa: Isa
) -> Entry:
    spec = mix.MixSpec(models=models, base=base, out=out, join=join, keep=keep)
    return compiled(mix.emit(spec), spec.op, isa), tuple(mix.fields(spec))


@cache
def _dots(first: Stored, second: Stored, isa: Isa) -> Entry:
    spec = dots.DotsSpec(models=(first, second))
    return compiled(dots.emit(spec), spec.op, isa), tuple(dots.fields(spec))


@cache
def _counts(form: Literal["upper", "lower"], models: tuple[Stored, ...], base: Stored, isa: Isa) -> Entry:
    spec = counts.CountsSpec(form=form, models=models, base=base)
    return compiled(counts.emit(spec), spec.op, isa), tuple(counts.fields(spec))


@dataclass
class Room:
    """The buffers of one thread, each as large as it ever had to be."""

    held: dict[str, Array] = field(default_factory=dict)

    def take(self, name: str, size: int) -> Array:
        """[size] bytes of unknown content, from a cache line on."""
        found = self.held.get(name)
        if found is None or found.size < size:
            raw = np.empty(size + LINE, np.uint8)
            first = -raw.ctypes.data % LINE
            found = self.held[name] = raw[first : first + size]
        return found[:size]


@dataclass(frozen=True)
class Stretches:
    """One tensor of every model, on its way through kernels."""

    name: str
    method: Merge
    runs: Sequence[Run]
    """The models', then the base's where there is one."""
    based: bool
    out: Stored
    isa: Isa
    rooms: threading.local
    lost: Lost

    @property
    def models(self) -> int:
        return len(self.runs) - self.based

    def observe(self, number: int, known: Array, aside: Aside[Any]) -> Iterator[Array]:
        """What round `number` sees, as the method's own `observe` says it."""
        assert isinstance(self.method, Looking)
        look = self.method.look(number, known)
        if look.form == "dots":
            for rows in aside(self._jobs(self._dots)):
                yield from rows
        elif look.form == "upper":
            tables: dict[int, Array] = {}
            for _ in aside(self._jobs(lambda span: self._upper(span, tables))):
                pass
            yield from tables.values()
        else:
            yield from aside(self._jobs(lambda span: self._lower(span, look)))

    def write(self, descriptor: int, offset: int, known: Array, aside: Aside[Any]) -> None:
        """Merge the tensor to byte `offset` of an open file."""
        assert isinstance(self.method, Mixing)
        asked = self.method.mix(self.models, known)
        keys = [key_of(asked.seed, k, self.name) for k in range(self.models)] if asked.keep == "drawn" else []
        given: dict[str, Array] = {
            "shares": np.array(asked.shares, np.float64).astype(np.float32),
            "above": np.array(asked.above, np.float64).astype(np.float32),
            "scale": np.array([asked.scale], np.float64).astype(np.float32),
            "keys": np.array([key >> shift & _WORD for key in keys for shift in (0, 64)], np.uint64),
        }
        width = WIDTH[self.out]

        def one(span: tuple[int, int]) -> None:
            out = self._mixed(span, asked, given)
            pieces.put(descriptor, out, offset + span[0] * width)

        for _ in aside(self._jobs(one)):
            pass

    def _jobs(self, work: Callable[[tuple[int, int]], T]) -> Iterator[Callable[[], T]]:
        for span in pieces.stretches(self.runs[0].size):
            yield partial(work, span)

    def _mixed(self, span: tuple[int, int], asked: Mix, given: dict[str, Array]) -> Array:
        """The merged numbers of a stretch, as stored."""
        start, size = span[0], span[1] - span[0]
        stored = self._stored()
        base = stored[-1] if self.based else None
        entry = _mix(stored[: self.models], base, self.out, asked.join, asked.keep, self.isa)
        out = self._room().take("out", size * WIDTH[self.out])
        more = {name: array.ctypes.data for name, array in given.items()}
        more |= {"out": out.ctypes.data, "below": asked.below, "start": start, "N": size}
        self._call(entry, span, more)
        return out

    def _dots(self, span: tuple[int, int]) -> Array:
        size = span[1] - span[0]
        found = np.empty((-(-size // pieces.PIECE), 3))
        more = {"piece": pieces.PIECE, "N": size, "dots": found.ctypes.data}
        self._call(_dots(*self._stored(), self.isa), span, more)
        return found

    def _upper(self, span: tuple[int, int], tables: dict[int, Array]) -> None:
        """Count into the table of this thread."""
        me = threading.get_ident()
        if me not in tables:
            tables[me] = np.zeros((self.models, counts.HIGH), np.int64)
        *models, base = self._stored()
        more = {"N": span[1] - span[0], "counts": tables[me].ctypes.data}
        self._call(_counts("upper", tuple(models), base, self.isa), span, more)

    def _lower(self, span: tuple[int, int], look: Look) -> Array:
        """How many of each model, then theirs, one model after another."""
        size = span[1] - span[0]
        *models, base = self._stored()
        rows = self._room().take("rows", 4 * size * self.models).view(np.uint32).reshape(self.models, size)
        found = np.empty(self.models, np.int64)
        bins = np.array(look.bins, np.uint32) << np.uint32(16)
        given = {"bins": bins, "rows": rows, "found": found}
        more = {name: array.ctypes.data for name, array in given.items()} | {"N": size}
        self._call(_counts("lower", tuple(models), base, self.isa), span, more)
        kept = [row[:count] for row, count in zip(rows, found.tolist(), strict=True)]
        return np.concatenate([found.astype(np.uint32), *kept])

    def _call(self, entry: Entry, span: tuple[int, int], more: dict[str, int]) -> None:
        """Read a stretch of every input and run a kernel on it."""
        bad = ctypes.c_int64(-1)
        more["bad"] = ctypes.addressof(bad)
        for number, run in enumerate(self.runs):
            name = "base" if self.based and number == self.models else f"x{number}"
            more[name] = self._address(name, run, span)
        kernel, fields = entry
        values = [more[name] for name in fields]
        kernel(ctypes.byref((ctypes.c_int64 * (len(values) + 2))(0, 1, *values)))
        if bad.value >= 0:
            self.lost(self.name, bad.value)

    def _address(self, name: str, run: Run, span: tuple[int, int]) -> int:
        """Where the stretch of one input lies in memory, once it is there."""
        if isinstance(run, InMemory):
            return int(run.numbers.ctypes.data) + span[0] * run.numbers.itemsize
        assert isinstance(run, OnDisk)
        width = WIDTH[NAMES[run.dtype]]
        raw = self._room().take(name, (span[1] - span[0]) * width)
        pieces.fill(run.descriptor, raw, run.offset + span[0] * width)
        return int(raw.ctypes.data)

    def _room(self) -> Room:
        if not hasattr(self.rooms, "room"):
            self.rooms.room = Room()
        room: Room = self.rooms.room
        return room

    def _stored(self) -> tuple[Stored, ...]:
        return tuple(NAMES[_dtype(run)] for run in self.runs)


def can(method: Merge, runs: Sequence[Run], out: str) -> bool:
    """Whether kernels merge a tensor: the method has them, and every input is stored in a dtype they read."""
    if not _said(method, "mix", "merge") or (method.rounds and not _said(method, "look", "observe")):
        return False
    return all(dtype in NAMES for dtype in (out, *map(_dtype, runs)))


def _said(method: Merge, of: str, what: str) -> bool:
    """Whether a method says in `of` what its `what` does; a subclass may have changed the latter alone."""
    order = [kind for kind in type(method).__mro__ if {of, what} & {*vars(kind)}]
    return bool(order) and callable(vars(order[0]).get(of))


def _dtype(run: Run) -> str:
    """How the numbers of a run are stored."""
    if isinstance(run, OnDisk):
        return run.dtype
    return "F32" if isinstance(run, InMemory) and run.numbers.dtype == np.float32 else ""
