"""What a model scores on data: loss in nats a token, accuracy of multiple choice by likelihood.

Shapes: B sequences, T tokens, V vocabulary. Logits are compared in float32; sums are float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from effc.compiler.losses import IGNORED, surprise, weighted
from effc.compiler.method import Data
from effc.compiler.model import Model
from effc.compiler.step import Step
from effc.runtime.data._vocabulary import Ids
from effc.runtime.data.choices import Question, Questions

TOKENS = 4096
"""Tokens that go through the model at once."""


@torch.inference_mode()
def loss(model: Model, data: Data, split: str = "heldout", limit: int | None = None) -> float:
    """Mean surprise over every token of a split that carries loss, or over its first `limit` sequences."""
    size = data.size(split) if limit is None else min(limit, data.size(split))
    length = data.batch(split, [0]).ids.shape[1]
    rows = max(1, TOKENS // length)
    total, count = 0.0, 0
    for start in range(0, size, rows):
        batch = data.batch(split, range(start, min(size, start + rows)))
        carrying = int((batch.labels != IGNORED).sum())
        logits = model(batch.ids, step=batch.step)
        mean, _ = weighted(logits, batch.labels != IGNORED, [(1.0, surprise)], batch.labels)
        total += float(mean) * carrying
        count += carrying
    return total / max(1, count)


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
    logits = model(ids, step=Step(places, key_mask=None if bool(mask.all()) else mask)).float()
    logp = torch.log_softmax(logits, -1)
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
