"""Ops of models that spend less on some tokens: how deep a token goes, who still runs, what has left.

Shapes: B sequences, T tokens, d width, V classes. What is said of every token [B, T] stands among the sides
of the step, so that blocks behind find it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from effc.compiler.blocks.mlp import ACTIVATIONS
from effc.compiler.op_kind import op as _op
from effc.compiler.step import Step

DEPTH = "depth"
"""Name among the sides of a step: how deep a token may still go [B, T] int64; a layer has a least depth."""
PASSED = "passed"
"""With the number of an exit: the sum of the gates [B, T] up to there."""
ANSWERS = "answers"
"""Logits [B, T, V] of tokens that have left."""
LEFT = "left"
"""The number of the exit at which a token left [B, T] int64, -1 while it has not."""


@_op()
def schedule(x: Tensor, step: Step, *, most: int, least: int, horizon: int) -> Tensor:
    """Layers that each token [B, T] runs: round(most - (most - least) min(t / horizon, 1)), t its position"""
    return depths(step.positions, most, least, horizon)


@_op()
def whole_prompt(depth: Tensor, step: Step, *, most: int) -> Tensor:
    """depth [B, T] int64; while a prompt is read, the most for every token"""
    return torch.full_like(depth, most) if step.phase == "prefill" else depth


@_op()
def running(step: Step, x: Tensor, *, least: int) -> Tensor:
    """Which of the tokens of x [B, T, ...] go this deep: [B, T] bool; all where nothing says how deep"""
    depth = step.sides.get(DEPTH)
    if depth is None:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    return depth[:, -x.shape[1] :] >= least


@_op()
def hold(y: Tensor, runs: Tensor) -> Tensor:
    """y [B, T, d], zero for tokens that do not run [B, T]"""
    return y.where(runs.unsqueeze(-1), 0.0)


@_op()
def confidence(z: Tensor, *, power: float) -> Tensor:
    """logits [..., V] -> [..., 4] float32: largest p, entropy, margin of the two largest, entropy of p^power.

    Entropies are shares of log V.
    """
    wide = z if z.dtype == torch.float64 else z.float()
    logp = torch.log_softmax(wide, -1)
    sharp = torch.log_softmax(power * logp, -1)
    two = logp.topk(2, -1).values.exp()
    span = math.log(z.shape[-1])
    entropies = [-(q.exp() * q).sum(-1) / span for q in (logp, sharp)]
    return torch.stack((two[..., 0], entropies[0], two[..., 0] - two[..., 1], entropies[1]), -1)


@_op()
def wide_linear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """x [..., i], w [o, i], b [o] -> [..., o] in x's dtype"""
    return F.linear(x, w.to(x.dtype), b.to(x.dtype))


@_op()
def exit_leave(x: Tensor, step: Step, gate: Tensor, z: Tensor, *, number: int, threshold: float) -> Tensor:
    """x [B, T, d] as it is; of gates [B, T, 1] and logits [B, T, V] who leaves here stands in the sides.

    The chance to leave, given that a token is still there: min(g, rest) / rest, rest = 1 - gates before.
    """
    goes = leaving(step, gate.squeeze(-1), number, threshold)
    settle(step, goes, number)
    held = step.sides.get(ANSWERS)
    step.sides[ANSWERS] = z.where(goes.unsqueeze(-1), torch.zeros_like(z) if held is None else held)
    return x


@_op()
def exit_answer(z: Tensor, step: Step) -> Tensor:
    """logits [B, T, V], of tokens that have left those that they left with"""
    held = step.sides.get(ANSWERS)
    if held is None:
        return z
    return z.where(running(step, z, least=1).unsqueeze(-1), held[:, -z.shape[1] :])


def depths(positions: Tensor, most: int, least: int, horizon: int) -> Tensor:
    """positions [B, T] int64 -> layers that run there [B, T] int64; halves round up."""
    done = positions.clamp(max=horizon)
    return most - ((most - least) * done * 2 + horizon - 1) // (2 * horizon)


def there(step: Step, x: Tensor, number: int) -> Tensor:
    """Which tokens of x [B, T, ...] come to the exit of this number [B, T] bool; asked again, the same."""
    left = step.sides.get(LEFT)
    if left is None:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    return (left < 0) | (left >= number)


def leaving(step: Step, gate: Tensor, number: int, threshold: float) -> Tensor:
    """gate [B, T] of an exit -> who of those that come there leaves [B, T] bool."""
    earlier = [f"{PASSED}.{n}" for n in range(number) if f"{PASSED}.{n}" in step.sides]
    before = step.sides[earlier[-1]] if earlier else torch.zeros_like(gate)
    step.sides[f"{PASSED}.{number}"] = before + gate
    rest = (1 - before).clamp(min=0)
    chance = torch.minimum(gate, rest) / rest.where(rest > 0, 1.0)
    return ((rest <= 0) | (chance >= threshold)) & there(step, gate, number)


def settle(step: Step, goes: Tensor, number: int) -> None:
    """Write into the sides who went [B, T] at the exit of this number."""
    left = step.sides.get(LEFT)
    left = torch.full_like(goes, -1, dtype=torch.int64) if left is None else left
    left = left.masked_fill(left >= number, -1).masked_fill(goes, number)
    step.sides[LEFT], step.sides[DEPTH] = left, (left < 0).long()


@_op()
def first_learners(scores: Tensor, *, fewest: int) -> Tensor:
    """scores [..., N + 1] -> how many learners run [...] int64: the largest, of equal ones the fewer"""
    return scores[..., fewest:].argmax(-1) + fewest


@_op()
def learned(
    x: Tensor, count: Tensor, w1: Tensor, w2: Tensor, shift: Tensor | None = None, *, form: str
) -> Tensor:
    """x [..., i], count [...], w1 [N, h, i], w2 [N, o, h], shift [o] -> [..., o]: the first `count` summed"""
    out = torch.zeros(*x.shape[:-1], w2.shape[1], dtype=x.dtype, device=x.device)
    for j in range(w1.shape[0]):
        y = F.linear(ACTIVATIONS[form](F.linear(x, w1[j])), w2[j])
        y = y + shift if shift is not None and j == 0 else y
        out = out + y.where((count > j).unsqueeze(-1), 0.0)
    return out


@_op()
def fires(z: Tensor) -> Tensor:
    """1 where z is above 0, else 0, in z's dtype"""
    return (z > 0).to(z.dtype)
