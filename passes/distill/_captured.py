"""What a teacher said: the k likeliest tokens of every position and their log-probabilities.

Kept by the content of a sequence, not by its number, so that data in another order finds its own. Log-
probabilities are normalized over the whole vocabulary: what the k tokens lack of 1 is the mass of the tail.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from effc.compiler.method import Batch, Context
from effc.compiler.model import Model

_UNIT = 64
"""Batches in one unit of the journal."""


class Captured:
    """Sequence -> (token ids [T, k] int32, log-probabilities [T, k])."""

    def __init__(self) -> None:
        self._kept: dict[bytes, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, sequences: Tensor, ids: Tensor, logp: Tensor) -> None:
        """sequences [B, T], ids and logp [B, T, k]"""
        for key, row_ids, row_logp in zip(_keys(sequences), ids, logp, strict=True):
            self._kept[key] = (row_ids, row_logp)

    def told(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """ids [B, T, k] int64 and log-probabilities [B, T, k] float32 of a batch.

        Raises: KeyError for a sequence that the teacher has not seen, which is a bug of the caller.
        """
        found = [self._kept[key] for key in _keys(batch.ids)]
        device = batch.ids.device
        ids = torch.stack([i for i, _ in found]).to(device, torch.int64)
        return ids, torch.stack([p for _, p in found]).to(device, torch.float32)


@torch.no_grad()
def capture(
    teacher: Model, batches: Iterable[Batch], k: int, dtype: torch.dtype, context: Context
) -> Captured:
    """Let the teacher read every sequence once; groups of batches are units of the journal."""
    captured = Captured()
    for number, group in enumerate(_groups(batches)):
        name = f"teacher-{number:05d}"
        if context.journal is not None and context.journal.done(name):
            kept, _ = context.journal.read(name)
        else:
            kept = _speak(teacher, group, k, dtype)
            if context.journal is not None:
                context.journal.save(name, kept, {})
        captured.add(kept["sequences"], kept["ids"], kept["logp"])
        if context.stop():
            raise KeyboardInterrupt
    return captured


def told_bytes(tokens: int, k: int, stored: str) -> int:
    """Bytes of what is kept for this many positions."""
    return tokens * k * (4 + (2 if stored == "fp16" else 4))


def _speak(teacher: Model, group: list[Batch], k: int, dtype: torch.dtype) -> dict[str, Tensor]:
    ids, logp = [], []
    for batch in group:
        z = teacher(batch.ids, step=batch.step).float()
        top = (z - z.logsumexp(-1, keepdim=True)).topk(k, dim=-1)
        ids.append(top.indices.to("cpu", torch.int32))
        logp.append(top.values.to("cpu", dtype))
    sequences = torch.cat([b.ids for b in group]).cpu()
    return {"sequences": sequences, "ids": torch.cat(ids), "logp": torch.cat(logp)}


def _groups(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    group: list[Batch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == _UNIT:
            yield group
            group = []
    if group:
        yield group


def _keys(sequences: Tensor) -> list[bytes]:
    return [row.numpy().tobytes() for row in sequences.to("cpu", torch.int32)]
