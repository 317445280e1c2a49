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
    """Keys and values of earlier tokens: per attention block one pair of static tensors [B, Hk, S, h].

    A block's pair is made when the block first writes, so layers may differ in heads and width.
    """

    def __init__(self, length: int) -> None:
        """`length` is the number of slots, the longest sequence the cache can hold."""
        self.length = length
        self.filled = 0
        self._pairs: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, block: object, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [B, Hk, T, h] behind the filled slots; give views of all slots written so far."""
        end = self.filled + k.shape[2]
        if end > self.length:
            raise ValueError(f"the cache has {self.length} slots, {end} are needed")
        if id(block) not in self._pairs:
            batch, heads, _, width = k.shape
            shape = (batch, heads, self.length)
            self._pairs[id(block)] = (k.new_zeros(*shape, width), v.new_zeros(*shape, v.shape[3]))
        keys, values = self._pairs[id(block)]
        keys[:, :, self.filled : end] = k
        values[:, :, self.filled : end] = v
        return keys[:, :, :end], values[:, :, :end]

    @property
    def bytes(self) -> int:
        """Bytes that all pairs take."""
        return sum(t.numel() * t.element_size() for pair in self._pairs.values() for t in pair)


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
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def start(self) -> int:
        """The slot of this call's first token."""
        return self.cache.filled if self.cache is not None else 0

    def lengths(self) -> Tensor:
        """[B, 1] int64: tokens of each row so far, as far as positions tell."""
        return self.positions.amax(1, keepdim=True) + 1

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
    sides: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    """What a block before the layers says about every token [B, T], for all blocks behind it."""
        if self.segments is not None:
            full = full & (self.segments[:, None, :, None] == self.segments[:, None, None, :])
        if self.key_mask is not None:
            full = full & self.key_mask[:, None, None, :slots]
            full = full | ~full.any(-1, keepdim=True)
        return full, False
