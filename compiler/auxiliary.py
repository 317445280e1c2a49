"""Auxiliary losses: what blocks ask of a training beside the loss of its method, returned and not hidden.

A mixture asks for balance: E sum_i f_i p_i with f_i the share of all choices that fell on expert i and p_i
the mean probability that the router gave it; 1 where every expert serves alike. f is counted and carries no
gradient. Within one optimizer step f is the share so far over all parts (`scope = global`), or that of each
part alone (`micro`).

Shapes: B sequences, T tokens, N tokens that count, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from effc.compiler.blocks.averaged import Averaged
from effc.compiler.blocks.moe import MoE, best
from effc.compiler.blocks.recursion import Enter
from effc.compiler.blocks.tempered import Tempered
from effc.compiler.depth_losses import depth_losses, move_biases

if TYPE_CHECKING:
    from effc.compiler.method import Batch
    from effc.compiler.model import Model

Mixture = MoE | Tempered
Inputs = dict[str, list[Tensor]]
"""Path of a block -> what entered it, once for each time that it ran."""


def answered(model: Model, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits [B, T, V] of a training pass, and weighted auxiliary losses [] by name, to be added to the loss.

    Mixtures, ensembles and loops that choose tokens are put into training here: then capacity, jitter,
    dealing out and the choice of the best are in force.
    """
    blocks = mixtures(model)
    for _, unit in model.units():
        if isinstance(unit, MoE | Tempered | Averaged | Enter):
            unit.train()
        if isinstance(unit, Tempered):
            unit.progress = batch.at / max(1, batch.of - 1)
    with watched(blocks) as seen:
        logits: Tensor = model(batch.ids, step=batch.step)
    found = [loss for path, block in blocks.items() for loss in _terms(path, block, seen[path], batch)]
    pooled = _pooled([(b, p, f) for b, p, f in found if b.pooled])
    apart = [b.balance * _loss(p, f) for b, p, f in found if not b.pooled]
    weighed = [*pooled, *apart]
    more = {"balance": torch.stack(weighed).sum()} if weighed else {}
    return logits, more | depth_losses(model, batch.step)


@torch.no_grad()
def after_step(model: Model, weights: Mapping[str, nn.Parameter], progress: float) -> None:
    """What blocks do with their `weights`, by name, after each optimizer step; progress is 1 at the last."""
    move_biases(model, weights)
    for path, unit in model.units():
        if isinstance(unit, Averaged):
            for name in ("gate", "up", "down"):
                if (weight := weights.get(f"{path}.experts.{name}.weight")) is not None:
                    weight.copy_(unit.pulled(weight, progress))
    for path, module in model.gm.named_modules():
        if hasattr(type(module), "follow"):  # statistics of batches, which have no gradient
            follow: Any = module.follow
            follow(path, weights)


def total(main: Tensor, more: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The losses of a step: `total` is the main one with all auxiliary ones, which stand beside it."""
    return {"total": torch.stack([main, *more.values()]).sum() if more else main, **more}


def mixtures(model: Model) -> dict[str, Mixture]:
    """The mixtures of a model by path; one that several layers share once."""
    return {path: block for path, block in model.units() if isinstance(block, MoE | Tempered)}


@contextmanager
def watched(blocks: Mapping[str, Mixture]) -> Iterator[Inputs]:
    """The inputs of blocks, gathered while the context is open."""
    seen: Inputs = {path: [] for path in blocks}

    def hook(path: str) -> torch.utils.hooks.RemovableHandle:
        return blocks[path].register_forward_pre_hook(lambda _, args: seen[path].append(args[0]))

    handles = [hook(path) for path in blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def usage(model: Model, batch: Batch) -> dict[str, Tensor]:
    """Path of each mixture -> share of choices that fell on each expert [E], over all times that it ran."""
    blocks = mixtures(model)
    with torch.no_grad(), watched(blocks) as seen:
        model(batch.ids, step=batch.step)
        rows = {path: torch.cat([_counted(x, batch) for x in found]) for path, found in seen.items()}
        counts = {path: _counts(block, block.probabilities(rows[path])) for path, block in blocks.items()}
    return {path: c / c.sum() for path, c in counts.items()}


def _terms(
    path: str, block: Mixture, inputs: list[Tensor], batch: Batch
) -> Iterator[tuple[Mixture, Tensor, Tensor]]:
    """For each time that a block with a balance ran: itself, p [E] and f [E]."""
    for number, x in enumerate(inputs if block.balance else ()):
        p = block.probabilities(_counted(x, batch))
        counts = _counts(block, p.detach())
        if block.scope == "global":
            key = f"{path}/{number}"
            counts = counts + batch.tally.get(key, torch.zeros_like(counts))
            batch.tally[key] = counts
        yield block, p.mean(0), counts / counts.sum()


def _loss(p: Tensor, f: Tensor) -> Tensor:
    return p.numel() * (p * f).sum()


def _pooled(found: list[tuple[Mixture, Tensor, Tensor]]) -> list[Tensor]:
    """One loss for all layers with as many experts: their shares and probabilities are averaged first."""
    groups: dict[tuple[int, float], list[tuple[Tensor, Tensor]]] = {}
    for block, p, f in found:
        groups.setdefault((block.n_experts, block.balance), []).append((p, f))
    return [
        balance
        * _loss(torch.stack([p for p, _ in group]).mean(0), torch.stack([f for _, f in group]).mean(0))
        for (_, balance), group in groups.items()
    ]


def _counts(block: Mixture, p: Tensor) -> Tensor:
    """p [N, E] -> choices of each expert [E], in p's dtype; what a full expert would drop is counted."""
    if isinstance(block, Tempered):  # all run, so what counts is their weight
        return p.sum(0)
    _, chosen = best(p, block.active, block.renormalize)
    return torch.bincount(chosen.flatten(), minlength=block.n_experts).to(p.dtype)


def _counted(x: Tensor, batch: Batch) -> Tensor:
    """x [B, T, d] -> the rows of real tokens [N, d]; padding has no say in the balance."""
    mask = batch.step.key_mask
    flat = x.reshape(-1, x.shape[-1])
    return flat if mask is None else flat[mask[:, -x.shape[1] :].reshape(-1)]
