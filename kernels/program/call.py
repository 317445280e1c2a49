"""Call: one kernel in a program, with the buffers it reads and writes and the tensors it is given.

A buffer is a name with a number of bytes a row; a program has M rows of any mix of sequences. `{name}` in the
text of a call stands for the address of a buffer, `[i]` of its tensors for the i-th tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from effc.kernels.kernel import KernelSpec

ROWS = 512
"""Rows that one call of a program takes at most, unless there are more sequences: tokens of prompts."""


class Split(StrEnum):
    """How members share a call."""

    ROWS = "rows"
    """Rows r0 to r1. With few rows every member does all of them in memory of its own, and none waits."""
    SHARED_ROWS = "shared rows"
    """Rows s0 to s1 of memory that all share."""
    ITEMS = "items"
    """Pieces of the result i0 to i1, of `items`."""


@dataclass(frozen=True, slots=True)
class Call:
    """One kernel call."""

    op: str
    split: Split
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    text: str
    """C statement; may use M, r0 to r1 or s0 to s1 (its share of rows that all share) or i0 to i1,
    `{buffer}`, `{0}`, `{1}`, ... for its tensors and `{cache}` for the attention's cache"""
    tensors: tuple[str, ...] = ()
    """Names of tensors, in the order in which `text` counts them."""
    functions: tuple[str, ...] = ()
    """C text of the functions it calls; equal texts are pasted once."""
    items: str = "M"
    """C expression: how many pieces there are to share, of `ITEMS` calls."""
    layer: int | None = None
    paths: tuple[str, ...] = ()
    """Units of the model that it does the work of."""
    why: str = ""
    """Why this kernel and not a faster one; empty when there is none."""
    specs: tuple[KernelSpec, ...] = ()
    """What its functions are emitted from."""
    across: bool = False
    """Whether a call that shares rows reads rows of other members too."""
    opens: bool = False
    """Whether it is the first to use the next cache; `{cache}` is that one from here on."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a program's text depends on."""

    calls: tuple[Call, ...]
    widths: Mapping[str, int]
    """Bytes a row of every buffer."""
    stream: str
    """The buffer that holds the rows behind the last layer; of these, the wanted rows go on."""
    stream_width: int
    """Numbers in a row of it."""
    tail: int
    """Calls from this number on work on wanted rows alone."""
    vocab: int
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Buffers that are written in the place of another, which nobody reads afterwards."""
