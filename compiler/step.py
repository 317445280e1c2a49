"""Step: what blocks that mix positions need beside the activations: positions, packing, padding, cache.

Shapes: B sequences, T tokens of this call, S key slots (cached ones first), Hk key heads, h head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Phase = Literal["train", "prefill", "decode"]


class Cache:
    """What blocks remember of earlier tokens, made when a block first writes, so layers may differ in all.

    Attention keeps a pair of static tensors [B, Hk, S, h], of the keys and values of all tokens or, in a
    ring, of those in its window. A recurrent block keeps its state, whose size does not depend on the
    sequence.
    """

    def __init__(self, length: int) -> None:
        """`length` is the number of slots, the longest sequence the cache can hold."""
        self.length = length
        self.filled = 0
        self._pairs: dict[int, tuple[Tensor, Tensor]] = {}
        self._states: dict[int, tuple[Tensor, ...]] = {}

    def extend(
        self,
        block: object,
        k: Tensor,
        v: Tensor,
        slots: int | None = None,
        first: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Write k, v [B, Hk, T, h] behind the filled slots; give views of all slots written so far.

        `slots`: how many the block ever writes, where that is fewer than the cache has. `first`: learned keys
        and values [P, Hk, n, h] of P streams (B a multiple of P, stream by stream), in slots before all.
        """
        end = self._end(k)
        lead = 0 if first is None else first[0].shape[2]
        begun = id(block) in self._pairs
        keys, values = self._pair(block, k, v, lead + (self.length if slots is None else slots))
        if first is not None and not begun:
            keys[:, :, :lead], values[:, :, :lead] = (t.repeat_interleave(len(k) // len(t), 0) for t in first)
        keys[:, :, lead + self.filled : lead + end] = k
        values[:, :, lead + self.filled : lead + end] = v
        return keys[:, :, : lead + end], values[:, :, : lead + end]

    def slide(self, block: object, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
        """Write k, v [B, Hk, T, h] into a ring of `window` slots; give all keys and values that one of the T
        queries may see, in any order, and the slot [S] of each, counted from the start of the sequence.
        """
        start, end = self.filled, self._end(k)
        keys, values = self._pair(block, k, v, min(window, self.length))
        size, device = keys.shape[2], k.device
        slots = torch.arange(max(0, start - size), start, device=device)
        one = end - start == 1
        if not one and start:  # read what the new ones overwrite
            held = slots % size
            k_all, v_all = torch.cat((keys[:, :, held], k), 2), torch.cat((values[:, :, held], v), 2)
        else:
            k_all, v_all = k, v
        kept = torch.arange(max(start, end - size), end, device=device)
        keys[:, :, kept % size] = k[:, :, kept - start]
        values[:, :, kept % size] = v[:, :, kept - start]
        if one:
            ring = torch.arange(min(end, size), device=device)
            return keys[:, :, :end], values[:, :, :end], end - 1 - (end - 1 - ring) % size
        return k_all, v_all, torch.cat((slots, torch.arange(start, end, device=device)))

    def state(self, block: object) -> tuple[Tensor, ...] | None:
        """What a recurrent block kept after the last token; None before the first."""
        return self._states.get(id(block))

    def keep(self, block: object, *state: Tensor) -> None:
        """The state of a recurrent block, in place of the one it had."""
        self._states[id(block)] = state

    def _end(self, k: Tensor) -> int:
        end = self.filled + k.shape[2]
        if end > self.length:
            raise ValueError(f"the cache has {self.length} slots, {end} are needed")
        return end

    def _pair(self, block: object, k: Tensor, v: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        if id(block) not in self._pairs:
            shape = (*k.shape[:2], slots)
            self._pairs[id(block)] = (k.new_zeros(*shape, k.shape[3]), v.new_zeros(*shape, v.shape[3]))
        return self._pairs[id(block)]

    @property
    def bytes(self) -> int:
        """Bytes that all pairs and states take."""
        held = (*self._pairs.values(), *self._states.values())
        return sum(t.numel() * t.element_size() for tensors in held for t in tensors)


@dataclass(frozen=True, slots=True)
class Step:
    """One call of a model. Every block sees the same step, so masks and rotary tables are made once."""

    positions: Tensor
    """[B, T] int64: the place of each token in its own sequence (padding not counted)."""
    segments: Tensor | None = None
    """[B, T] int64: which packed document a token belongs to; tokens see their own segment only."""
    key_mask: Tensor | None = None
    """[B, S] bool: False for padding."""
    token_types: Tensor | None = None
    """[B, T] int64: sentence A or B of a pair encoder."""
    cache: Cache | None = None
    phase: Phase = "train"
    sides: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    """What a block before the layers says about every token [B, T], for all blocks behind it."""
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def start(self) -> int:
        """The slot of this call's first token."""
        return self.cache.filled if self.cache is not None else 0

    def lengths(self) -> Tensor:
        """[B, 1] int64: tokens of each row so far, as far as positions tell."""
        return self.positions.amax(1, keepdim=True) + 1

    def slots(self, length: int) -> Tensor:
        """[T] int64: the slots of this call's tokens, the same for every row."""
        return torch.arange(self.start, self.start + length, device=self.positions.device)

    def real(self, length: int) -> Tensor | None:
        """[B, T] bool: which of this call's tokens are no padding; None where all are."""
        if self.key_mask is None:
            return None
        return self.key_mask[:, self.start : self.start + length]

    def fresh(self) -> Tensor | None:
        """[B, T] bool: where a packed document begins behind another; None where nothing is packed."""
        if self.segments is None:
            return None
        begins = torch.zeros_like(self.segments, dtype=torch.bool)
        begins[:, 1:] = self.segments[:, 1:] != self.segments[:, :-1]
        return begins

    def mask(self, length: int, causal: bool, window: int | None) -> tuple[Tensor | None, bool]:
        """Who may see whom: (mask [B or 1, 1, T, S] bool or None, whether plain causal order is all).

        A row that sees nobody (a padding token) sees everybody instead: its output is read by no one,
        and an empty softmax would spread NaN.
        """
        slots = self.start + length
        if window is not None and slots <= window:
            window = None
        key = ("mask", length, causal, window)
        if key not in self.memo:
            self.memo[key] = self._mask(length, slots, causal, window)
        found: tuple[Tensor | None, bool] = self.memo[key]
        return found

    def _mask(self, length: int, slots: int, causal: bool, window: int | None) -> tuple[Tensor | None, bool]:
        plain = self.key_mask is None and self.segments is None and window is None
        if plain and (not causal or length == 1 or self.start == 0):
            return None, causal and length > 1
        device = self.positions.device
        query = torch.arange(self.start, slots, device=device)[:, None]
        keys = torch.arange(slots, device=device)[None, :]
        seen = torch.ones(length, slots, dtype=torch.bool, device=device)
        if causal:
            seen = keys <= query
        if window is not None:
            near = keys > query - window if causal else (keys - query).abs() < window
            seen = seen & near
        full = seen[None, None]
        if self.segments is not None:
            full = full & (self.segments[:, None, :, None] == self.segments[:, None, None, :])
        if self.key_mask is not None:
            full = full & self.key_mask[:, None, None, :slots]
            full = full | ~full.any(-1, keepdim=True)
        return full, False
