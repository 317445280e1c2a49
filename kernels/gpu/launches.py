"""Launches: a decoder as kernel launches on buffers that stay in place, so that a CUDA graph repeats them.

Shapes: B sequences, M rows (tokens) of a call, S slots of a sequence in the cache, k experts of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from effc.kernels.kernel import KernelSpec
from effc.kernels.linear_attention.spec_gpu import LinearAttentionGpuSpec
from effc.kernels.shared_prefix.spec import SharedPrefixSpec

if TYPE_CHECKING:
    from effc.kernels.gpu.caches import Caches

Angles = Callable[[int], tuple[Tensor, Tensor]]
"""S -> cosines and sines [S, r / 2] float32 of one attention."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One step of a program: a kernel, several that belong together, or an op of torch."""

    op: str
    run: Callable[[Room, Caches], None]
    layer: int | None = None
    paths: tuple[str, ...] = ()
    """Units of the model that it does the work of."""
    why: str = ""
    """Why this kernel and not a faster one; empty when there is none."""
    specs: tuple[KernelSpec, ...] = ()


@dataclass(frozen=True, slots=True)
class Attended:
    """What one attention keeps: its kernel for new tokens, its rotary angles, the keys that it may see."""

    spec: SharedPrefixSpec
    angles: Angles | None
    window: int | None = None

    def span(self, longest: int) -> int:
        """Slots of a sequence of at most `longest` tokens; a window's are written in turns."""
        return longest if self.window is None else min(self.window, longest)


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """A lowered model. Launches from `tail` on work on the last row of every sequence."""

    launches: tuple[Launch, ...]
    tail: int
    stream: int
    """The value whose last rows go on behind the layers."""
    output: int
    places: Mapping[int, int]
    """Value -> the buffer that holds it. Values that are never needed at once share one."""
    widths: Mapping[int, int]
    """Numbers in a row of every buffer."""
    attentions: tuple[Attended, ...]
    recurrences: tuple[LinearAttentionGpuSpec, ...]
    device: torch.device


class Bytes(NamedTuple):
    """A value as bytes, a scale to each row."""

    q: Tensor
    """[M, K] int8 or float8"""
    rows: Tensor
    """[M] float32"""
    totals: Tensor | None
    """[K / run, M] int32, sums of q over runs of columns, where a kernel wants them"""


class Choice(NamedTuple):
    """The experts of every row."""

    weights: Tensor
    """[M, k] float32"""
    chosen: Tensor
    """[M, k] int32; the number of experts stands for none"""


class Kept(NamedTuple):
    """Of a prompt's rows those that a cache keeps, int64."""

    rows: Tensor
    places: Tensor


class Room:
    """The rows of one call: what each is, and a buffer for every value."""

    def __init__(self, lowered: LaunchPlan, rows: int, spans: Iterable[int] = ()) -> None:
        device = lowered.device
        held = {
            n: torch.empty(rows, width, dtype=torch.bfloat16, device=device)
            for n, width in lowered.widths.items()
        }
        self.values = {value: held[place] for value, place in lowered.places.items()}
        self.sums: dict[int, Tensor] = {}
        """Of runs of columns of a value, where the kernel that made it summed them up."""
        self.bytes: dict[tuple[int, int], Bytes] = {}
        """Values as bytes, by the columns of their totals too, where a kernel before has made them."""
        self.choices: dict[int, Choice] = {}
        self.token = torch.zeros(rows, dtype=torch.long, device=device)
        self.position = torch.zeros(rows, dtype=torch.int32, device=device)
        self.places = {span: torch.zeros(rows, dtype=torch.int32, device=device) for span in spans}
        """By the slots that a cache has for a sequence: the row that each row takes there."""
        self.starts: Tensor | None = None
        """[B + 1] int32: rows of a prompt, sequence by sequence; None when every row is a sequence's next."""
        self.kept: dict[int, Kept] = {}
        """By slots, of prompts that are longer than a cache."""

    @property
    def rows(self) -> int:
        return len(self.token)
