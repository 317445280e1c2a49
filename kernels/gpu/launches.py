"""Launches: a decoder as kernel launches on buffers that stay in place, so that a CUDA graph repeats them.

Shapes: B sequences, M rows (tokens) of a call, S slots of a sequence in the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from effc.kernels.kernel import KernelSpec
from effc.kernels.shared_prefix.plan import Plan, plan
from effc.kernels.shared_prefix.spec import SharedPrefixSpec

Angles = Callable[[int], tuple[Tensor, Tensor]]
"""S -> cosines and sines [S, r / 2] float32 of one attention."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One step of a program: a kernel, several that belong together, or an op of torch."""

    op: str
    run: Callable[[Room, Caches], None]
    layer: int | None = None
    paths: tuple[str, ...] = ()
    """Units of the model that it does the work of."""
    why: str = ""
    """Why this kernel and not a faster one; empty when there is none."""
    specs: tuple[KernelSpec, ...] = ()


@dataclass(frozen=True, slots=True)
class Attended:
    """What one attention keeps: its kernel for new tokens, and its rotary angles."""

    spec: SharedPrefixSpec
    angles: Angles | None


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """A lowered model. Launches from `tail` on work on the last row of every sequence."""

    launches: tuple[Launch, ...]
    tail: int
    stream: int
    """The value whose last rows go on behind the layers."""
    output: int
    places: Mapping[int, int]
    """Value -> the buffer that holds it. Values that are never needed at once share one."""
    widths: Mapping[int, int]
    """Numbers in a row of every buffer."""
    attentions: tuple[Attended, ...]
    device: torch.device


class Room:
    """The rows of one call: what each is, and a buffer for every value."""

    def __init__(self, lowered: LaunchPlan, rows: int) -> None:
        device = lowered.device
        held = {
            n: torch.empty(rows, width, dtype=torch.bfloat16, device=device)
            for n, width in lowered.widths.items()
        }
        self.values = {value: held[place] for value, place in lowered.places.items()}
        self.sums: dict[int, Tensor] = {}
        """Of runs of columns of a value, where the kernel that made it summed them up."""
        self.token = torch.zeros(rows, dtype=torch.long, device=device)
        self.position = torch.zeros(rows, dtype=torch.int32, device=device)
        self.row = torch.zeros(rows, dtype=torch.int32, device=device)
        """Its row in every cache: slot S + position."""
        self.starts: Tensor | None = None
        """[B + 1] int32: rows of a prompt, sequence by sequence; None when every row is a sequence's next."""

    @property
    def rows(self) -> int:
        return len(self.token)


class Caches:
    """Keys and values of B sequences of at most S tokens: [B S, Hk, h] of every attention."""

    def __init__(self, lowered: LaunchPlan, batch: int, longest: int) -> None:
        device = lowered.device
        self.batch, self.longest = batch, longest
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.angles: list[tuple[Tensor, Tensor] | None] = []
        self.plans: dict[SharedPrefixSpec, Plan] = {}
        self.parts: dict[SharedPrefixSpec, int] = {}
        turns: dict[int, tuple[Tensor, Tensor]] = {}
        for attended in lowered.attentions:
            spec, angles = attended.spec, attended.angles
            shape = (batch * longest, spec.kv_heads, spec.head_dim)
            self.pairs.append(
                (
                    torch.zeros(shape, dtype=torch.bfloat16, device=device),
                    torch.zeros(shape, dtype=torch.bfloat16, device=device),
                )
            )
            if angles is not None and id(angles) not in turns:
                cosines, sines = angles(longest)
                turns[id(angles)] = cosines.to(device), sines.to(device)
            self.angles.append(None if angles is None else turns[id(angles)])
            if spec not in self.plans:
                made = plan(spec, [longest] * batch, [[b] for b in range(batch)])
                self.parts[spec] = int(made.first[-1])
                self.plans[spec] = made.to(device)
        self.begin = torch.arange(batch, dtype=torch.int32, device=device) * longest
        self.end = torch.zeros_like(self.begin)


@dataclass(slots=True)
class Session:
    """One batch of sequences under way: a prompt once, then a token of each at a time."""

    lowered: LaunchPlan
    batch: int
    longest: int
    logits: Tensor = field(init=False)
    """[B, V] float32, behind the last tokens"""
    chosen: Tensor = field(init=False)
    """[B] the first of the largest logits"""
    _caches: Caches = field(init=False)
    _room: Room = field(init=False)
    _tail: Room = field(init=False)
    _graph: torch.cuda.CUDAGraph | None = None

    def __post_init__(self) -> None:
        lowered = self.lowered
        self._caches = Caches(lowered, self.batch, self.longest)
        self._room = Room(lowered, self.batch)
        self._tail = Room(lowered, self.batch)
        width = lowered.widths[lowered.places[lowered.output]]
        self.logits = torch.empty(self.batch, width, device=lowered.device)
        self.chosen = torch.zeros(self.batch, dtype=torch.long, device=lowered.device)

    def prefill(self, tokens: Sequence[Tensor]) -> Tensor:
        """Prompts, one tensor of ids for each sequence -> logits.

        Raises:
            ValueError: there are not as many as sequences, one is empty, or longer than the cache.
        """
        lengths = [len(t) for t in tokens]
        if len(tokens) != self.batch or min(lengths) < 1 or max(lengths) > self.longest:
            raise ValueError(f"{self.batch} prompts of 1 to {self.longest} tokens are due, not {lengths}")
        device = self.lowered.device
        room = Room(self.lowered, sum(lengths))
        counts = torch.tensor(lengths)
        ends = counts.cumsum(0)
        slots = torch.repeat_interleave(torch.arange(self.batch), counts)
        positions = torch.arange(int(ends[-1])) - (ends - counts)[slots]
        room.token.copy_(torch.cat([t.to(device, torch.long) for t in tokens]))
        room.position.copy_(positions)
        room.row.copy_(slots * self.longest + positions)
        room.starts = torch.cat((torch.zeros(1, dtype=torch.long), ends)).int().to(device)
        self._through(room, (ends - 1).to(device))
        self._room.position.copy_(counts)
        self._room.row.copy_(counts + torch.arange(self.batch) * self.longest)
        return self.logits

    def next(self, tokens: Tensor) -> Tensor:
        """One more token [B] of each sequence -> logits. On a GPU the same graph is replayed every time."""
        self._room.token.copy_(tokens)
        if self.lowered.device.type != "cuda":
            self._step()
            return self.logits
        if self._graph is None:
            self._graph = self._captured()
        self._graph.replay()
        return self.logits

    def _step(self) -> None:
        """All that a new token takes, and the places of those behind it. Nothing waits for the host."""
        torch.add(self._room.row, 1, out=self._caches.end)
        self._through(self._room, None)
        self._room.position += 1
        self._room.row += 1

    def _captured(self) -> torch.cuda.CUDAGraph:
        """The step as a graph. It is run before, because kernels are compiled and libraries set up then."""
        before = self._room.position.clone(), self._room.row.clone()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self._step()
        torch.cuda.current_stream().wait_stream(aside)
        self._room.position.copy_(before[0])
        self._room.row.copy_(before[1])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph

    def _through(self, room: Room, last: Tensor | None) -> None:
        """All launches; behind the layers only the rows `last` [B] go on, all of them if None."""
        lowered, tail = self.lowered, self._tail
        for launch in lowered.launches[: lowered.tail]:
            launch.run(room, self._caches)
        stream = room.values[lowered.stream]
        tail.values[lowered.stream].copy_(stream if last is None else stream[last])
        for launch in lowered.launches[lowered.tail :]:
            launch.run(tail, self._caches)
        self.logits.copy_(tail.values[lowered.output])
        torch.argmax(self.logits, -1, out=self.chosen)
