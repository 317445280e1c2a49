"""What a lowered program scores on data, as `evaluate.loss` counts it for a model in torch.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import torch

from effc.compiler.losses import IGNORED, surprise, weighted
from effc.compiler.method import Data
from effc.kernels.program.run import Session
from effc.runtime.decoder import Ready

ROWS = 1024
"""Tokens that go through the program at once."""


@torch.inference_mode()
def program_loss(ready: Ready, data: Data, split: str = "heldout", limit: int | None = None) -> float:
    """Mean surprise in nats over every token of a split that carries loss, or over its first sequences."""
    size = data.size(split) if limit is None else min(limit, data.size(split))
    length = data.batch(split, [0]).ids.shape[1]
    rows = max(1, ROWS // length)
    session = Session(ready.program, ready.attentions, rows, length, rows * length)
    total, count = 0.0, 0
    for start in range(0, size, rows):
        batch = data.batch(split, range(start, min(size, start + rows)))
        b, t = batch.ids.shape
        slots = torch.arange(b).repeat_interleave(t)
        positions = torch.arange(t).repeat(b)
        logits = torch.empty(b * t, ready.lowered.plan.vocab)
        session.step(batch.ids.flatten().contiguous(), slots, positions, torch.arange(b * t), logits)
        carrying = int((batch.labels != IGNORED).sum())
        mean, _ = weighted(logits.view(b, t, -1), batch.labels != IGNORED, [(1.0, surprise)], batch.labels)
        total += float(mean) * carrying
        count += carrying
    return total / max(1, count)
