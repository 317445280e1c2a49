"""Caches: what the launches of a decoder keep of its sequences, in buffers that stay in place.

Shapes: B sequences of at most S tokens, Hk key heads of width h, K and V channels of a state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effc.kernels.gpu.launches import Kept, LaunchPlan, Room
from effc.kernels.shared_prefix.plan import Plan, plan
from effc.kernels.shared_prefix.spec import SharedPrefixSpec, refuses
from effc.specs.diagnostic import Diagnostic, EffcError


class Caches:
    """Keys and values [B s, Hk, h] of every attention, s its slots, and states [B, Hk, K, V] of recurrences.

    Attention with a window has as many slots as it may see keys. A token takes the slot of the oldest; the
    order of keys does not matter to softmax, and rotary positions are in the keys.
    """

    def __init__(self, lowered: LaunchPlan, batch: int, longest: int) -> None:
        """B sequences of at most `longest` tokens.

        Raises:
            EffcError: E503 when the kernels cannot reach so many keys.
        """
        device = lowered.device
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.angles: list[tuple[Tensor, Tensor] | None] = []
        self.spans = [attended.span(longest) for attended in lowered.attentions]
        self.plans: dict[tuple[SharedPrefixSpec, int], Plan] = {}
        self.parts: dict[tuple[SharedPrefixSpec, int], int] = {}
        turns: dict[int, tuple[Tensor, Tensor]] = {}
        for attended, span in zip(lowered.attentions, self.spans, strict=True):
            spec, angles = attended.spec, attended.angles
            if words := refuses(spec, batch, batch * span):
                title = f"no Triton kernel attends to {batch} sequences of {longest} tokens"
                raise EffcError(Diagnostic("E503", title, notes=(words,), help="run fewer sequences at once"))
            shape = (batch * span, spec.kv_heads, spec.head_dim)
            keys, values = (torch.zeros(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
            self.pairs.append((keys, values))
            if angles is not None and id(angles) not in turns:
                cosines, sines = angles(longest)
                turns[id(angles)] = cosines.to(device), sines.to(device)
            self.angles.append(None if angles is None else turns[id(angles)])
            if (spec, span) not in self.plans:
                made = plan(spec, [span] * batch, [[b] for b in range(batch)])
                self.parts[spec, span] = int(made.first[-1])
                self.plans[spec, span] = made.to(device)
        numbers = torch.arange(batch, dtype=torch.int32, device=device)
        self.begins = {span: numbers * span for span in self.spans}
        """By slots: the first row of each sequence [B] int32."""
        self.afters = {span: begin + 1 for span, begin in self.begins.items()}
        self.ends = {span: begin.clone() for span, begin in self.begins.items()}
        """By slots: the row behind the last that is written."""
        self.states = [
            torch.zeros(batch, spec.kv_heads, spec.key_dim, spec.value_dim, device=device)
            for spec in lowered.recurrences
        ]

    def follow(self, room: Room) -> None:
        """Where the next token of each sequence goes, and where its keys end. Nothing waits for the host."""
        for span, begin in self.begins.items():
            torch.remainder(room.position, span, out=room.places[span]).add_(begin)
            torch.clamp(room.position, max=span - 1, out=self.ends[span]).add_(self.afters[span])

    def lay(self, room: Room, slots: Tensor, positions: Tensor, lengths: Tensor) -> None:
        """Where the rows of prompts go: of sequences `slots` [M] at `positions` [M], of `lengths` [B].

        Of a prompt that is longer than a cache, its last tokens stay.
        """
        for span, places in room.places.items():
            due = slots * span + positions % span
            places.copy_(due)
            if int(lengths.max()) > span:
                rows = (positions >= (lengths - span)[slots]).nonzero().flatten()
                room.kept[span] = Kept(rows.to(places.device), due[rows].to(places.device))

    def store(self, number: int, room: Room, keys: Tensor, values: Tensor) -> None:
        """Keys and values [M, Hk, h] of the rows at hand, in the cache of one attention."""
        span = self.spans[number]
        kept = room.kept.get(span)
        at = room.places[span].long() if kept is None else kept.places
        for held, new in zip(self.pairs[number], (keys, values), strict=True):
            held.index_copy_(0, at, new if kept is None else new[kept.rows])
