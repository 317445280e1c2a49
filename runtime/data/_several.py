"""Several: a list of data as one, `data = [code, prose]`; a stage may also look at each apart.

Sequences are numbered one data after the other, so those of a pass are spread over all in any order drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from effc.compiler.method import Batch, Data
from effc.compiler.step import Step
from effc.specs.diagnostic import Diagnostic, EffcError
from effc.specs.recipe import Ref


class Several:
    """Data of one vocabulary and length; `train` is the split that each was named with."""

    def __init__(self, names: Sequence[str], parts: Sequence[Data], splits: Sequence[str | None]) -> None:
        """Raises EffcError E627 for sequences of different lengths and for a data without a token."""
        self.names, self.parts = tuple(names), tuple(parts)
        self.splits = tuple(split or "train" for split in splits)
        lengths = {}
        for name, part, split in zip(self.names, self.parts, self.splits, strict=True):
            if part.size(split) == 0 or part.tokens(split) == 0:
                raise _refused(f"`{name}` has 0 tokens in the split `{split}`", "give it more text")
            lengths[name] = part.batch(split, [0]).ids.shape[1]
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"`{name}` of {length}" for name, length in lengths.items())
            raise _refused(f"sequences differ in length: {told}", "give all the same `seq`")

    @property
    def fingerprints(self) -> dict[str, str]:
        """Name -> what its content is known by."""
        return {name: part.fingerprint for name, part in zip(self.names, self.parts, strict=True)}

    @property
    def fingerprint(self) -> str:
        told = [f"{p.fingerprint}.{s}" for p, s in zip(self.parts, self.splits, strict=True)]
        return hashlib.sha256("\n".join(told).encode()).hexdigest()

    @property
    def vocabulary(self) -> str:
        return self.parts[0].vocabulary

    @property
    def bytes_per_token(self) -> float:
        """The mean over all held-out tokens."""
        counts = [part.tokens("heldout") for part in self.parts]
        total = sum(n * part.bytes_per_token for n, part in zip(counts, self.parts, strict=True))
        return total / max(1, sum(counts))

    def size(self, split: str) -> int:
        return sum(part.size(own) for part, own in self._each(split))

    def tokens(self, split: str) -> int:
        return sum(part.tokens(own) for part, own in self._each(split))

    def batch(self, split: str, indices: Sequence[int]) -> Batch:
        """Rows of one data after another stand together as they were asked for."""
        places = [self._place(split, index) for index in indices]
        found = []
        for number, run in groupby(places, key=lambda place: place[0]):
            part, own = self._each(split)[number]
            found.append(part.batch(own, [index for _, index in run]))
        return found[0] if len(found) == 1 else _joined(found)

    def each(self) -> Iterator[Data]:
        """Each data alone, its chosen split as `train`."""
        for name, part, split in zip(self.names, self.parts, self.splits, strict=True):
            yield Several([name], [part], [split])

    def _each(self, split: str) -> list[tuple[Data, str]]:
        own = self.splits if split == "train" else (split,) * len(self.parts)
        return list(zip(self.parts, own, strict=True))

    def _place(self, split: str, index: int) -> tuple[int, int]:
        """Number of the data, and of the sequence in it: later passes over all are later ones over each."""
        sizes = [part.size(own) for part, own in self._each(split)]
        passes, index = divmod(index, sum(sizes))
        for number, size in enumerate(sizes):
            if index < size:
                return number, index + passes * size
            index -= size
        raise IndexError(index)


def split_of(method: Any) -> str:
    """The split that a stage reads: what its data was named with; several know their own."""
    return (method.data.split or "train") if isinstance(method.data, Ref) else "train"


def _joined(batches: Sequence[Batch]) -> Batch:
    """One batch of the rows of all."""
    steps = [batch.step for batch in batches]
    places = [step.positions for step in steps]
    segments = _stacked([step.segments for step in steps], list(map(torch.zeros_like, places)))
    mask = _stacked([step.key_mask for step in steps], [torch.ones_like(p, dtype=torch.bool) for p in places])
    step = Step(torch.cat(places), segments, mask)
    return Batch(torch.cat([b.ids for b in batches]), torch.cat([b.labels for b in batches]), step)


def _stacked(found: Sequence[Tensor | None], missing: Sequence[Tensor]) -> Tensor | None:
    """Rows of all; where some data have none, what stands for it: one segment, no padding."""
    if all(tensor is None for tensor in found):
        return None
    return torch.cat([m if f is None else f for f, m in zip(found, missing, strict=True)])


def _refused(note: str, advice: str) -> EffcError:
    title = "a list of data cannot be read as one"
    return EffcError(Diagnostic("E627", title, notes=(note,), help=advice, about="data"))
