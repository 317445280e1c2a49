"""The heap: in a training freed blocks are used again, untouched by the system; afterwards they are gone."""

from __future__ import annotations

import ctypes
import resource

import pytest
import torch

from effc.runtime.heap import keeping, returning

PAGES = (64 << 20) // resource.getpagesize()
"""Of a block of 64 MB."""


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def touched() -> int:
    """Pages first touched by the last eight of sixteen blocks of 64 MB."""
    for number in range(16):
        if number == 8:
            before = faults()
        torch.empty(16 << 20).fill_(1.0)
    return faults() - before


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_a_training_touches_its_blocks_once() -> None:
    with keeping():
        inside = touched()
    with returning():
        outside = touched()
    assert inside < PAGES
    assert outside > 2 * inside
