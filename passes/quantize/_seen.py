"""What a quantizer of inputs remembers of calibration data: ranges, and samples that are even over all of it.

Shapes: x [N, K], N rows of K channels; q [B, H, T, h], k and v [B, Hk, S, h], p [B, H, T, S].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from effc.compiler.blocks.attention import Attention
from effc.compiler.blocks.echo_attention import probabilities
from effc.compiler.step import Step

ROWS = 4096
"""Most rows of a sample, and fewer where they are long."""
NUMBERS = 1 << 25
"""Most numbers of a sample of rows."""
SINGLE = 1 << 18
"""Most numbers of a sample of numbers."""


def most_rows(channels: int) -> int:
    """Rows that a sample of inputs holds at most."""
    return max(512, min(ROWS, NUMBERS // max(1, channels)))


class Even:
    """Every n-th row [*] of all that went in, n doubled whenever there are too many; nothing is drawn."""

    def __init__(self, most: int) -> None:
        self.most, self.every, self.count = most, 1, 0
        self.parts: list[Tensor] = []
        self.kept = 0

    def add(self, x: Tensor) -> None:
        """x [N, *]"""
        part = x[-self.count % self.every :: self.every]
        self.count += len(x)
        self.parts.append(part.clone())
        self.kept += len(part)
        while self.kept > self.most:
            self.every *= 2
            whole = self.whole()[::2].clone()
            self.parts, self.kept = [whole], len(whole)

    def whole(self) -> Tensor:
        """[n, *], n at most `most`"""
        if len(self.parts) > 1:
            self.parts = [torch.cat(self.parts)]
        return self.parts[0]


class Rows:
    """The least and the largest number of every channel, and a sample of rows."""

    def __init__(self, channels: int) -> None:
        self.low = torch.full((channels,), torch.inf)
        self.high = torch.full((channels,), -torch.inf)
        self.sample = Even(most_rows(channels))

    def add(self, x: Tensor) -> None:
        """x [N, K]"""
        wide = x.float()
        self.low = torch.minimum(self.low, wide.amin(0))
        self.high = torch.maximum(self.high, wide.amax(0))
        self.sample.add(wide)

    def state(self) -> dict[str, Tensor]:
        return {"low": self.low, "high": self.high, "sample": self.sample.whole()}


class Numbers:
    """The least and the largest of all numbers, and a sample of them."""

    def __init__(self) -> None:
        self.low = self.high = 0.0
        self.sample = Even(SINGLE)

    def add(self, x: Tensor) -> None:
        """x of any shape"""
        wide = x.float()
        self.low, self.high = min(self.low, float(wide.min())), max(self.high, float(wide.max()))
        self.sample.add(wide.flatten())


class Heads:
    """Queries, keys, values and probabilities of an attention block, each as numbers."""

    def __init__(self) -> None:
        self.seen = {name: Numbers() for name in ("q", "k", "v", "p")}

    def add(self, x: Tensor) -> None:
        """Rows alone say nothing of attention."""

    def look(self, block: nn.Module, x: Tensor, step: Step) -> None:
        """x [B, T, D]"""
        attention: Any = block
        assert isinstance(attention, Attention)
        q, k, v = attention.projected(x, step)
        mask, ordered = step.mask(q.shape[2], attention.causal, attention.window)
        p = probabilities(q, k, mask, ordered, attention.factor, attention.cap)
        for name, found in (("q", q), ("k", k), ("v", v), ("p", p)):
            self.seen[name].add(found)

    def state(self) -> dict[str, Tensor]:
        return {name: numbers.sample.whole() for name, numbers in self.seen.items()}
