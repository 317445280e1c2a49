"""Session: a batch of sequences that goes through the launches of a decoder, a prompt, then token by token.

Shapes: B sequences, M rows (tokens) of a call, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from effc.kernels.gpu.caches import Caches
from effc.kernels.gpu.launches import LaunchPlan, Room


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
        self._room = Room(lowered, self.batch, self._caches.begins)
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
        room = Room(self.lowered, sum(lengths), self._caches.begins)
        counts = torch.tensor(lengths)
        ends = counts.cumsum(0)
        slots = torch.repeat_interleave(torch.arange(self.batch), counts)
        positions = torch.arange(int(ends[-1])) - (ends - counts)[slots]
        room.token.copy_(torch.cat([t.to(device, torch.long) for t in tokens]))
        room.position.copy_(positions)
        self._caches.lay(room, slots, positions, counts)
        room.starts = torch.cat((torch.zeros(1, dtype=torch.long), ends)).int().to(device)
        self._through(room, (ends - 1).to(device))
        self._room.position.copy_(counts)
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
        """All that a new token takes, and the position of those behind it. Nothing waits for the host."""
        self._caches.follow(self._room)
        self._through(self._room, None)
        self._room.position += 1

    def _captured(self) -> torch.cuda.CUDAGraph:
        """The step as a graph. It is run before, because kernels are compiled and libraries set up then."""
        before = self._room.position.clone(), [state.clone() for state in self._caches.states]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self._step()
        torch.cuda.current_stream().wait_stream(aside)
        self._room.position.copy_(before[0])
        for state, old in zip(self._caches.states, before[1], strict=True):
            state.copy_(old)
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
