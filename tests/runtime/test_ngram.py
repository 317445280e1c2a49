"""The n-gram baseline is a probability, and knows what it has counted."""

from __future__ import annotations

import numpy as np
import pytest

from effc.runtime.ngram import NGram, bits_per_byte, byte_model

TEXTS = ["the cat sat on the mat", "the dog sat on the cat", "a mat and a dog"]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_behind_any_context_add_up_to_one(order: int) -> None:
    documents = [np.frombuffer(t.encode(), np.uint8).astype(np.uint64) - 32 for t in TEXTS]
    model = NGram(documents, order, bits=7, symbols=96)
    for context in ([], [84], [84, 72, 69], [1, 2, 3, 4]):
        begin = np.array(context, dtype=np.uint64)
        before = model.bits_of([begin]) if context else 0.0
        total = sum(2 ** -(model.bits_of([np.append(begin, np.uint64(w))]) - before) for w in range(96))
        assert total == pytest.approx(1.0, abs=1e-9)


def test_longer_contexts_and_known_text_surprise_less() -> None:
    told = ["for i in range(10):\n    print(i)\n" * 20]
    short, long = byte_model(told, 2), byte_model(told, 5)
    assert bits_per_byte(long, told) < bits_per_byte(short, told) < 3
    assert bits_per_byte(long, ["zebra quilt"]) > 6


def test_orders_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="64 bits"):
        byte_model(TEXTS, 9)
