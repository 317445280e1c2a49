"""Losses of routers that send tokens to different depths, from what a training pass left in the step.

expert: a router that sees the present token alone shall say who was chosen: aux BCE(logit, chosen), of the
guessing router where there is one, among tokens that ran the loop before; z mean(l^2). token: balance N
sum_i f_i P_i, with f_i the share of tokens that run i loops (no gradient) and P_i their mean probability; z
mean(logsumexp(l)^2). Source: Mixture-of-Recursions, arXiv 2507.10524, appendix on routing.

Shapes: B rows, T tokens, N loops; logits [B, T], or [B, T, N] of routing by tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from effc.compiler.blocks.recursion import Enter
from effc.compiler.model import Model
from effc.compiler.step import Step
from effc.compiler.tokens import real


def enters(model: Model) -> dict[str, Enter]:
    """The entries of loops by path, in graph order."""
    return {path: unit for path, unit in model.units() if isinstance(unit, Enter)}


def depth_losses(model: Model, step: Step) -> dict[str, Tensor]:
    """Weighted losses [] by name, of the pass that filled this step; none without loops."""
    found: dict[str, list[Tensor]] = {}
    for unit in enters(model).values():
        for name, term in _terms(unit, step):
            found.setdefault(name, []).append(term)
    return {name: torch.stack(terms).sum() for name, terms in found.items()}


def _terms(unit: Enter, step: Step) -> Iterator[tuple[str, Tensor]]:
    sides = step.sides
    if unit.route == "token":
        if unit.loop == 0:
            yield from _balance(unit, step)
        return
    if unit.share < 1:
        among = sides[f"alive {unit.loop - 1}"]
        chosen = sides[f"alive {unit.loop}"][among]
        told = sides[f"guess {unit.loop}" if unit.guesses else f"logits {unit.loop}"][among]
        if unit.aux and len(told):
            wanted = chosen.to(torch.float32)
            yield "router", unit.aux * functional.binary_cross_entropy_with_logits(told.float(), wanted)
    if unit.z:
        logits = sides[f"logits {unit.loop}"][sides[f"alive {unit.loop}"]].float()
        yield "z", unit.z * logits.square().mean()


def _balance(unit: Enter, step: Step) -> Iterator[tuple[str, Tensor]]:
    whole = real(step.sides["bypass 0"], step)
    logits, depth = step.sides["depths"][whole].float(), step.sides["depth"][whole]
    counts = torch.bincount(depth, minlength=unit.loops).to(logits.dtype)
    if unit.biased:
        unit.load = counts if unit.load is None else unit.load + counts
    elif unit.balance:
        p = torch.softmax(logits, -1).mean(0)
        yield "balance", unit.balance * unit.loops * (p * (counts / counts.sum())).sum()
    if unit.z:
        yield "z", unit.z * logits.logsumexp(-1).square().mean()


@torch.no_grad()
def move_biases(model: Model, weights: Mapping[str, nn.Parameter]) -> None:
    """After an optimizer step: depths that too few tokens take become likelier by one step of the bias."""
    for path, unit in enters(model).items():
        if (bias := weights.get(f"{path}.bias")) is not None and unit.load is not None:
            bias.add_(unit.balance * torch.sign(unit.load.mean() - unit.load).to(bias.dtype))
            unit.load = None


@torch.no_grad()
def agreement(model: Model, ids: Tensor) -> float:
    """ids [B, T] -> the share of tokens of which the router without future says what the k largest say, over
    all loops that leave tokens out. Of a model in evaluation, which it stays.
    """
    step = model.step(ids)
    right = total = 0
    units = [unit for unit in enters(model).values() if unit.route == "expert" and unit.share < 1]
    try:
        for unit in enters(model).values():
            unit.train()
        model(ids, step=step)
    finally:
        for unit in enters(model).values():
            unit.eval()
    for unit in units:
        among = step.sides[f"alive {unit.loop - 1}"]
        told = step.sides[f"guess {unit.loop}" if unit.guesses else f"logits {unit.loop}"][among]
        right += int(((told > 0) == step.sides[f"alive {unit.loop}"][among]).sum())
        total += int(among.sum())
    return right / max(1, total)
