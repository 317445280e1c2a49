"""What a model scores on data: loss in nats a token, accuracy of multiple choice by likelihood.

Shapes: B sequences, T tokens, V vocabulary. Logits are compared in float32; sums are float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from effc.compiler.losses import IGNORED, surprise, weighted
from effc.compiler.method import Batch, Data
from effc.compiler.model import Model
from effc.compiler.plan import ATTENDED
from effc.compiler.presence import computed_each
from effc.compiler.spent import Spent, counting
from effc.compiler.step import Step
from effc.runtime.data._vocabulary import Ids
from effc.runtime.data.choices import Question, Questions

TOKENS = 4096
"""Tokens that go through the model at once."""
TOGETHER = 16
"""Batches that go through a block of a model on disk while it is in memory."""


@torch.inference_mode()
def loss(model: Model, data: Data, split: str = "heldout", limit: int | None = None) -> float:
    """Mean surprise over every token of a split that carries loss, or over its first `limit` sequences."""
    size = data.size(split) if limit is None else min(limit, data.size(split))
    length = data.batch(split, [0]).ids.shape[1]
    rows = max(1, TOKENS // length)
    total, count = 0.0, 0
    starts = range(0, size, rows)
    batches = (data.batch(split, range(start, min(size, start + rows))) for start in starts)
    for batch, logits in _answered(model, batches):
        carrying = int((batch.labels != IGNORED).sum())
        mean, _ = weighted(logits, batch.labels != IGNORED, [(1.0, surprise)], batch.labels)
        total += float(mean) * carrying
        count += carrying
    return total / max(1, count)


def _answered(model: Model, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Tensor]]:
    """Every batch with its logits. A model on disk is read block by block, once for TOGETHER batches."""
    if not model.is_meta:
        for batch in batches:
            yield batch, model(batch.ids, step=batch.step)
        return
    while some := list(islice(batches, TOGETHER)):
        yield from zip(some, computed_each(model, [(b.ids, b.step) for b in some]), strict=True)


@torch.inference_mode()
def spent(model: Model, data: Data, split: str = "heldout", limit: int = 64) -> Spent:
    """What a model computed on the first `limit` sequences of a split: operations, layers that ran."""
    size = min(limit, data.size(split))
    rows = max(1, TOKENS // data.batch(split, [0]).ids.shape[1])
    with counting(model, ATTENDED) as found:
        for start in range(0, size, rows):
            batch = data.batch(split, range(start, min(size, start + rows)))
            model(batch.ids, step=batch.step)
    return found


def bits_per_byte(model: Model, data: Data, split: str = "heldout") -> float:
    """Loss in bits for each byte of text, comparable between vocabularies."""
    return loss(model, data, split) / math.log(2) / data.bytes_per_token


def accuracy(model: Model, questions: Questions, normalize: bool = False) -> float:
    """Share of questions whose right choice is the likeliest; `normalize`: for each byte of a choice."""
    right = 0
    for question in questions.items:
        scores = likelihoods(model, question)
        if normalize:
            scores = scores / torch.tensor(question.lengths, dtype=scores.dtype)
        right += int(scores.argmax()) == question.answer
    return right / len(questions.items)


@torch.inference_mode()
def likelihoods(model: Model, question: Question) -> Tensor:
    """log p of every choice behind the prompt [C] float64; choices run together, padded on the right."""
    rows = [np.concatenate([question.prompt, choice]) for choice in question.choices]
    ids, mask = _padded(rows)
    places = torch.arange(ids.shape[1]).expand_as(ids)
    step = Step(places, key_mask=None if bool(mask.all()) else mask)
    logits = next(computed_each(model, [(ids, step)])) if model.is_meta else model(ids, step=step)
    logp = torch.log_softmax(logits.float(), -1)
    scores = torch.zeros(len(rows), dtype=torch.float64)
    for i, choice in enumerate(question.choices):
        start = len(question.prompt)
        told = range(max(start, 1), start + len(choice))
        at = torch.tensor(list(told))
        scores[i] = logp[i, at - 1, ids[i, at]].double().sum()
    return scores


def _padded(rows: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.from_numpy(row.astype(np.int64))
        mask[i, : len(row)] = True
    return ids, mask
