"""Losses over the vocabulary, computed a few rows at a time, so that [tokens, V] in float32 never exists.

Shapes: N tokens (any leading shape), V vocabulary. Every loss is a mean over the tokens that carry one.

The gradient of a chunk is taken while its logits are in the cache of the processor, in float32, and kept in
the dtype of the logits; the backward pass only scales it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100
"""The label of a token without loss."""

Term = Callable[..., Tensor]
"""(logits [n, V] float32, aligned tensors [n, ...]) -> loss of every row, float32 [n]"""

_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 25}
"""Numbers of one chunk: about a megabyte of cache on a processor, enough work for a launch on a GPU."""


def weighted(
    logits: Tensor, counts: Tensor, terms: Sequence[tuple[float, Term]], *aligned: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The weighted sum of terms, differentiable in `logits`, and every term alone, detached.

    logits [..., V], counts [...] bool (tokens that carry loss), aligned [..., *] handed to each term row by
    row -> total [] float32, terms each [] float32. A batch in which no token counts has loss 0.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    others = tuple(a.reshape(-1, *a.shape[counts.dim() :]) for a in aligned)
    out: Tensor = _Chunked.apply(rows, counts.reshape(-1), tuple(terms), others)  # type: ignore[no-untyped-call]
    return out[0], list(out[1:].detach().unbind())


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Nats per token: logits [..., V], labels [...] int64, `IGNORED` where no loss is taken -> [] float32."""
    total, _ = weighted(logits, labels != IGNORED, [(1.0, surprise)], labels)
    return total


def surprise(z: Tensor, labels: Tensor) -> Tensor:
    """-log p of the label: z [n, V] float32, labels [n] -> [n]."""
    return functional.cross_entropy(z, labels, reduction="none")


class _Chunked(torch.autograd.Function):
    """Terms and their gradient in one walk over the rows. Output: [1 + terms], the weighted total first."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        counts: Tensor,
        terms: tuple[tuple[float, Term], ...],
        others: tuple[Tensor, ...],
    ) -> Tensor:
        """rows [N, V], counts [N] bool, others [N, *] each."""
        n = int(counts.sum())
        sums = torch.zeros(len(terms), dtype=torch.float64, device=rows.device)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(rows) if wanted else None
        for part, chosen in _parts(rows, counts):
            with torch.set_grad_enabled(wanted):
                z = rows[part][chosen].detach().float().requires_grad_(wanted)
                values = [term(z, *(o[part][chosen] for o in others)).sum() for _, term in terms]
                total = torch.stack([w * v for (w, _), v in zip(terms, values, strict=True)]).sum() / n
            sums += torch.stack([v.detach() for v in values]).double() / n
            if gradient is not None:
                gradient[part][chosen] = torch.autograd.grad(total, z)[0].to(gradient.dtype)
        if gradient is not None:
            gradient[~counts] = 0.0
            ctx.save_for_backward(gradient)
        weights = torch.tensor([w for w, _ in terms], dtype=torch.float64, device=rows.device)
        return torch.cat([(weights * sums).sum()[None], sums]).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        """Only the total carries gradient; the single terms are for people."""
        (gradient,) = ctx.saved_tensors
        scale = grads[0][0]
        if scale.device.type == "cpu" and float(scale) == 1.0:  # elsewhere, looking would wait for the device
            return gradient, None, None, None
        return gradient * scale.to(gradient.dtype), None, None, None


def _parts(rows: Tensor, counts: Tensor) -> Iterator[tuple[slice, slice | Tensor]]:
    """Chunks of rows, each with its rows that carry loss: a slice, which copies nothing, where all do."""
    size = max(1, _CHUNK.get(rows.device.type, _CHUNK["cpu"]) // rows.shape[1])
    found = [int(part.sum()) for part in counts.cpu().split(size)]
    for index, present in enumerate(found):
        part = slice(index * size, (index + 1) * size)
        if present == len(counts[part]):
            yield part, slice(None)
        elif present:
            yield part, counts[part]
