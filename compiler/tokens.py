"""Tokens at different depths: which of a batch run a loop, those as one row, and attention among them.

A loop takes some tokens of every row; the stream inside is [1, N, d], those tokens one after another, row by
row. What the loops know of each other stands among the sides of the step, as tensors [B, T, ...]: `alive r`
(bool, who runs loop r), `logits r`, `guess r`, `bypass r` (the stream before it), and of routing by tokens
`depth`, `weight` and `sum r`.

Shapes: B rows of T tokens, N tokens that run, H query heads, Hk key heads, h width, S keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from effc.compiler.blocks.attention import attend
from effc.compiler.blocks.rope import rotate, tables
from effc.compiler.step import Step

Router = Literal["expert", "token"]
"""expert: each loop chooses its tokens; token: each token chooses once how many loops it runs."""
Source = Literal["own", "tell", "hear"]
"""Keys and values: of this loop alone, of the first loop which hands them on, or heard from the first."""
Past = tuple[Tensor, ...]
"""Keys and values [B, Hk, A, h] with room for A tokens, how many are there [B], their slots [B, A]."""


def real(x: Tensor, step: Step) -> Tensor:
    """[B, T] bool: tokens that are no padding, of x [B, T, d]."""
    found = step.real(x.shape[1])
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if found is None else found


def best(logits: Tensor, among: Tensor, share: float, whole: Tensor) -> Tensor:
    """The k largest logits [B, T] of a row among some, k = floor(share * n) of its n `whole` tokens, at least
    one; of equal ones the earlier first -> [B, T] bool.
    """
    seats = (whole.sum(1, keepdim=True) * share + 1e-6).floor().clamp(min=1)
    masked = logits.masked_fill(~among, -torch.inf)
    order = masked.sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return among & (rank < seats)


def taken(x: Tensor, alive: Tensor) -> Tensor:
    """x [B, T, d], alive [B, T] -> [1, N, d]"""
    return x[alive].unsqueeze(0)


def put(x: Tensor, alive: Tensor, new: Tensor, add: bool) -> Tensor:
    """x [B, T, d] with new [N, d] in place of, or added to, what stands where `alive`; the rest untouched."""
    return x.index_put(alive.nonzero(as_tuple=True), new.to(x.dtype), accumulate=add)


@dataclass(frozen=True, slots=True)
class Among:
    """How the tokens of a loop attend."""

    heads: int
    kv_heads: int
    head_dim: int
    loop: int
    slot: int
    """Which layer of the shared stack."""
    kv: Source
    share: float
    """Of all tokens, about how many run this loop; makes room in the cache."""
    rope: Mapping[str, Any] | None
    window: int | None
    scale: float
    cap: float | None

    def run(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, step: Step, past: Past | None, room: int = 0
    ) -> tuple[Tensor, Past | None]:
        """q [N, H, h], k and v [N, Hk, h], None where they are heard -> y [N, H, h] and the longer past.

        The past is written in place while it has room; `room` is how many tokens a whole sequence may have.
        """
        alive = step.sides[f"alive {self.loop}"]
        rows, slots = alive.nonzero(as_tuple=True)
        if self.rope is not None:
            turns = tables(self.rope, self.head_dim, step, q.dtype)
            cos, sin = (t.expand(alive.shape[0], -1, -1, -1)[rows, 0, slots].unsqueeze(1) for t in turns)
            q = rotate(q, cos, sin)
            k = rotate(k, cos, sin) if k is not None else None
        counts = alive.sum(1)
        places = (alive.cumsum(1) - 1)[rows, slots]
        if k is None or v is None:
            names = ("keys", "values", "slots")
            keys, values, known = (step.sides[f"{name} {self.slot}"] for name in names)
            first = step.sides[f"rank {self.slot}"][rows, slots]
        else:
            past = self._longer(past, k, v, rows, places, slots + step.start, counts, room)
            keys, values, lengths, known = past
            before = lengths - counts
            first = before[rows] + places
            longest = int(lengths.max())
            keys, values, known = keys[:, :, :longest], values[:, :, :longest], known[:, :longest]
            if self.kv == "tell":
                told = {"keys": keys, "values": values, "slots": known}
                told["rank"] = before[:, None] + alive.cumsum(1) - 1
                step.sides.update({f"{name} {self.slot}": tensor for name, tensor in told.items()})
        if not len(rows):
            return q, past
        return self._attended(
            q, keys, values, known, rows, places, slots + step.start, first, counts, step
        ), past

    def _longer(
        self,
        past: Past | None,
        k: Tensor,
        v: Tensor,
        rows: Tensor,
        places: Tensor,
        slots: Tensor,
        counts: Tensor,
        room: int,
    ) -> Past:
        """The past with the new keys and values behind those of each row."""
        batch = counts.shape[0]
        lengths = torch.zeros_like(counts) if past is None else past[2]
        needed = int((lengths + counts).max())
        held = past[0].shape[2] if past is not None else 0
        if past is None or held < needed:
            size = max(needed, math.ceil(self.share * room), 2 * held if past is not None else 0)
            shape = (batch, self.kv_heads, size, self.head_dim)
            keys, values, known = (
                k.new_zeros(shape),
                v.new_zeros(shape),
                slots.new_zeros(batch, size, dtype=torch.int32),
            )
            if past is not None:
                keys[:, :, :held], values[:, :, :held], known[:, :held] = past[0], past[1], past[3]
        else:
            keys, values, known = past[0], past[1], past[3]
        at = lengths[rows] + places
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            every = torch.arange(self.kv_heads, device=k.device)
            index = (rows[:, None], every[None], at[:, None])
            keys, values = keys.index_put(index, k), values.index_put(index, v)
        else:
            keys[rows, :, at], values[rows, :, at] = k, v
        known[rows, at] = slots.to(torch.int32)
        return keys, values, lengths + counts, known

    def _attended(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        known: Tensor,
        rows: Tensor,
        places: Tensor,
        slots: Tensor,
        first: Tensor,
        counts: Tensor,
        step: Step,
    ) -> Tensor:
        """Rows without a token that runs are left out, so a batch at different depths costs what runs."""
        present = counts.nonzero()[:, 0]
        place = (counts > 0).cumsum(0)[rows] - 1, places
        longest = int(counts.max())
        wide = (
            q.new_zeros(len(present), longest, self.heads, self.head_dim).index_put(place, q).transpose(1, 2)
        )
        last = first.new_zeros(len(present), longest).index_put(place, first)
        key = torch.arange(keys.shape[2], device=q.device)
        seen = key <= last[:, :, None]
        if self.window is not None:
            here = slots.new_zeros(len(present), longest).index_put(place, slots)
            seen = seen & (known[present, None] > here[:, :, None] - self.window)
        if step.segments is not None:
            own = step.segments.new_zeros(len(present), longest).index_put(place, step.segments[rows, slots])
            theirs = step.segments[present].gather(1, known[present].long())
            seen = seen & (own[:, :, None] == theirs[:, None])
        seen = seen | ~seen.any(-1, keepdim=True)
        y = attend(wide, keys[present], values[present], seen[:, None], False, self.scale, self.cap)
        return y.transpose(1, 2)[place]
