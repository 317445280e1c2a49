"""Session: a compiled program with its tensors, its memory and its caches, called once a step.

Shapes: M rows (tokens) of a call, W wanted rows, V vocabulary, `slots` sequences with room for S tokens each.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from effc.kernels.cached_attention.layout import Cache, empty
from effc.kernels.cached_attention.spec import CachedAttentionSpec
from effc.kernels.cpu.build import build, load
from effc.kernels.cpu.entry import team
from effc.kernels.cpu.isa import Isa
from effc.kernels.cpu.pages import in_large_pages, room
from effc.kernels.linear_attention.spec_c import RecurrentSpec
from effc.kernels.program.call import Plan
from effc.kernels.program.emit import emit
from effc.kernels.program.settle import settle
from effc.kernels.recurrent_cell import RecurrentCellSpec

_POINTER, _LONG = ctypes.c_void_p, ctypes.c_long
Angles = Callable[[int], tuple[Tensor, Tensor]]
"""S -> cosines and sines [S, r / 2] float32 of one attention."""


class _Cache(ctypes.Structure):
    _fields_ = (
        ("keys", _POINTER),
        ("values", _POINTER),
        ("S", _LONG),
        ("cosines", _POINTER),
        ("sines", _POINTER),
    )


_MEMORY = ("token", "slot", "position", "wanted", "logits", "chosen", "best", "where", "arena", "own")


class _Program(ctypes.Structure):
    _fields_ = (
        ("team", _POINTER),
        *((name, _LONG) for name in ("members", "M", "wanted_rows", "capacity", "own_bytes")),
        *((name, _POINTER) for name in _MEMORY),
        ("tensors", ctypes.POINTER(_POINTER)),
        ("caches", ctypes.POINTER(_Cache)),
    )


class Program:
    """The machine code of a plan and the tensors it reads; sessions share it."""

    def __init__(self, plan: Plan, tensors: Mapping[str, Tensor], isa: Isa, threads: int) -> None:
        """`tensors` by name, as the plan's calls name them.

        Raises:
            EffcError: E501 or E502 when the text cannot be compiled.
        """
        self.plan, self.isa, self.threads = plan, isa, threads
        self.text, names = emit(plan)
        self.library: Any = load(build(self.text, isa))
        for name, given in (("arena_bytes", [_LONG]), ("own_bytes", [])):
            entry = getattr(self.library, name)
            entry.argtypes, entry.restype = given, _LONG
        self.library.program.restype = None
        self.tensors = in_large_pages({name: tensors[name] for name in dict.fromkeys(names)})
        addresses = [self.tensors[name].data_ptr() for name in names]
        self.table = (_POINTER * max(1, len(addresses)))(*addresses)
        self.found = settle(plan, self.library, self.tensors, isa, threads)
        """What was measured of its kernels on this machine."""

    @property
    def bytes(self) -> int:
        """Bytes of all tensors, each once."""
        found = {t.data_ptr(): t.numel() * t.element_size() for t in self.tensors.values()}
        return sum(found.values())


class Session:
    """Memory for one batch of sequences. Not for use by two threads at a time."""

    def __init__(
        self,
        program: Program,
        attentions: Sequence[tuple[CachedAttentionSpec | RecurrentSpec | RecurrentCellSpec, Angles | None]],
        slots: int,
        longest: int,
        rows: int,
    ) -> None:
        """`longest`: tokens of the longest sequence; `rows`: most rows of a call."""
        self.program, self.rows, self.slots = program, rows, slots
        members = program.threads
        self.arena = room(program.library.arena_bytes(rows) + 64)
        self.own_bytes = program.library.own_bytes()
        self.own = torch.empty(self.own_bytes * members + 64, dtype=torch.uint8)
        self.best = torch.empty(rows, members)
        self.where = torch.empty(rows, members, dtype=torch.int64)
        self.caches: list[Cache] = []
        self.states: list[Tensor] = []
        self.angles: dict[int, tuple[Tensor, Tensor]] = {}
        entries = []
        for spec, angles in attentions:
            if isinstance(spec, RecurrentSpec | RecurrentCellSpec):
                self.states.append(torch.zeros(slots, spec.state))
                entries.append(_Cache(self.states[-1].data_ptr(), 0, 0, 0, 0))
                continue
            keys = spec.keys(longest)
            cache = empty(spec, slots, keys)
            self.caches.append(cache)
            turns = (0, 0)
            if angles is not None:
                found = self.angles.setdefault(id(angles), angles(longest))
                turns = (found[0].data_ptr(), found[1].data_ptr())
            entries.append(_Cache(cache.keys.data_ptr(), cache.values.data_ptr(), keys, *turns))
        self.table = (_Cache * max(1, len(entries)))(*entries)
        self.arguments = _Program(
            team=team(program.isa),
            members=members,
            capacity=rows,
            own_bytes=self.own_bytes,
            best=self.best.data_ptr(),
            where=self.where.data_ptr(),
            arena=_aligned(self.arena),
            own=_aligned(self.own),
            tensors=program.table,
            caches=self.table,
        )

    def step(
        self,
        token: Tensor,
        slot: Tensor,
        position: Tensor,
        wanted: Tensor,
        logits: Tensor,
        chosen: Tensor | None = None,
    ) -> Tensor:
        """token, slot, position [M] int64, wanted [W] int64 rows -> logits [W, V] float32, which is filled.

        `chosen` [W] int64, where given, is filled with the index of the largest logit of each row.
        The caller answers for the ranges: token < V, slot < slots, position < longest, wanted < M.
        """
        a = self.arguments
        a.M, a.wanted_rows = token.shape[0], wanted.shape[0]
        a.token, a.slot, a.position = token.data_ptr(), slot.data_ptr(), position.data_ptr()
        a.wanted, a.logits = wanted.data_ptr(), logits.data_ptr()
        a.chosen = None if chosen is None else chosen.data_ptr()
        self.program.library.program(ctypes.byref(a))
        return logits


def _aligned(memory: Tensor) -> int:
    """The first address of a buffer that is a multiple of 64."""
    return -(-memory.data_ptr() // 64) * 64
