"""An n-gram model with interpolated back-off: the line that a trained model of the zoo has to beat.

Modified Kneser-Ney: with c the count of an n-gram and h its first n - 1 symbols,
p_n(w | h) = max(c(hw) - D, 0) / c(h) + (mass taken off behind h / c(h)) p_{n-1}(w | h without its first),
D one of three discounts by count (1, 2, more); orders below the highest count distinct predecessors.
Symbols are bytes or tokens; an n-gram is one 64-bit number, so orders reach 64 / bits.

Source: Chen and Goodman, An Empirical Study of Smoothing Techniques for Language Modeling, 1998, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.uint64]
Symbols = NDArray[np.uint64]

_LEAST = 0.05
"""Least discount: in little text the estimate can be zero, and what was not seen would be impossible."""


@dataclass(frozen=True, slots=True)
class _Order:
    """Counts of all k-grams seen, and of what follows each context."""

    grams: Codes
    counts: NDArray[np.float64]
    contexts: Codes
    totals: NDArray[np.float64]
    """c(h) of every context"""
    taken: NDArray[np.float64]
    """what the discounts take off behind every context"""
    discounts: NDArray[np.float64]
    """[4]: D of counts 0, 1, 2 and more"""


class NGram:
    """Counts `documents`, then tells the surprise of others."""

    def __init__(self, documents: Sequence[Symbols], order: int, bits: int, symbols: int) -> None:
        """`bits` of a symbol, `symbols` there are; symbol number 2**bits - 1 pads the start of a document.

        Raises: ValueError when an n-gram does not fit 64 bits.
        """
        if order * bits > 64:
            raise ValueError(f"{order} symbols of {bits} bits do not fit 64 bits")
        self.order, self.bits, self.symbols = order, np.uint64(bits), symbols
        grams, counts = np.unique(
            np.concatenate([self._codes(d, order) for d in documents]), return_counts=True
        )
        self._orders: list[_Order] = []
        for k in range(order, 0, -1):
            self._orders.append(self._count(grams, counts))
            mask = np.uint64((1 << (bits * (k - 1))) - 1)
            grams, counts = np.unique(grams & mask, return_counts=True)
        self._orders.reverse()

    def bits_of(self, documents: Sequence[Symbols]) -> float:
        """The surprise of all symbols of the documents, in bits."""
        codes = np.concatenate([self._codes(d, self.order) for d in documents])
        p = np.full(len(codes), 1.0 / self.symbols)
        for k, order in enumerate(self._orders, 1):
            p = self._interpolated(order, self._last(codes, k), p)
        return float(-np.log2(p).sum())

    def _codes(self, document: Symbols, order: int) -> Codes:
        """The n-gram that ends at every symbol, as a number."""
        pad = np.full(order - 1, (1 << int(self.bits)) - 1, dtype=np.uint64)
        padded = np.concatenate([pad, document.astype(np.uint64)])
        codes = np.zeros(len(document), dtype=np.uint64)
        for k in range(order):
            codes = (codes << self.bits) | padded[k : k + len(document)]
        return codes

    def _last(self, codes: Codes, k: int) -> Codes:
        width = int(self.bits) * k
        return codes if width >= 64 else codes & np.uint64((1 << width) - 1)

    def _count(self, grams: Codes, counts: NDArray[np.int64]) -> _Order:
        contexts, starts = np.unique(grams >> self.bits, return_index=True)
        n1, n2, n3, n4 = (max(1, int((counts == i).sum())) for i in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2)
        discounts = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        discounts = np.clip(discounts, [0.0, *[_LEAST] * 3], [0.0, 1.0, 2.0, 3.0])
        taken = np.add.reduceat(discounts[np.minimum(counts, 3)], starts)
        totals = np.add.reduceat(counts.astype(np.float64), starts)
        return _Order(grams, counts.astype(np.float64), contexts, totals, taken, discounts)

    def _interpolated(self, order: _Order, codes: Codes, lower: NDArray[np.float64]) -> NDArray[np.float64]:
        at, known = _find(order.contexts, codes >> self.bits)
        place, seen = _find(order.grams, codes)
        count = np.where(seen, order.counts[place], 0.0)
        kept = count - order.discounts[np.minimum(count, 3).astype(np.int64)]
        p = (kept + order.taken[at] * lower) / order.totals[at]
        return np.where(known, p, lower)


def byte_model(texts: Sequence[str], order: int) -> NGram:
    """Over the bytes of UTF-8 text; byte 255 never occurs in it and pads."""
    return NGram([_bytes(t) for t in texts], order, bits=8, symbols=256)


def bits_per_byte(model: NGram, texts: Sequence[str]) -> float:
    """Bits for each byte of text, of a model over bytes."""
    documents = [_bytes(t) for t in texts]
    return model.bits_of(documents) / sum(map(len, documents))


def highest_order(symbols: int) -> int:
    """The longest n-gram of this many symbols, and one to pad, that fits."""
    return 64 // (int(log2(symbols)) + 1)


def _bytes(text: str) -> Symbols:
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint64)


def _find(sorted_: Codes, wanted: Codes) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Where each number stands, and whether it is there at all."""
    at = np.minimum(np.searchsorted(sorted_, wanted), len(sorted_) - 1)
    return at, sorted_[at] == wanted
