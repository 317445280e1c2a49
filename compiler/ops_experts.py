"""Ops of mixtures: whom a token goes to, each copy through its own expert, and their sum.

Shapes: N tokens in a row, E experts, k active ones, i and o widths, d width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from effc.compiler.blocks.moe import best
from effc.compiler.blocks.tempered import gated, kept
from effc.compiler.op_kind import op


@op(gives=2)
def route(scores: Tensor, like: Tensor, *, active: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """scores [N, E] -> weights [N, k] in like's dtype and chosen [N, k]: the k largest of the softmax"""
    wide = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    weights, chosen = best(torch.softmax(wide, -1), active, renormalize)
    return weights.to(like.dtype), chosen


@op(gives=2)
def temper(scores: Tensor, like: Tensor, *, act: str, tau: float, least: float) -> tuple[Tensor, Tensor]:
    """scores [N, E] -> weights [N, E] in like's dtype and numbers [N, E], E for a weight below `least`"""
    wide = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    weights, chosen = kept(torch.softmax(gated(wide, act) / tau, -1), least)
    return weights.to(like.dtype), chosen


@op()
def spread(x: Tensor, chosen: Tensor) -> Tensor:
    """x [N, d] -> [N, k, d]: a copy for each active expert"""
    return x.unsqueeze(1).expand(-1, chosen.shape[1], -1)


@op()
def expert_linear(x: Tensor, w: Tensor, chosen: Tensor) -> Tensor:
    """x [N, k, i], w [E, o, i], chosen [N, k] -> [N, k, o]: each copy through its own expert"""
    out = x.new_zeros(*x.shape[:2], w.shape[1])
    for expert in range(w.shape[0]):
        here = chosen == expert
        out[here] = F.linear(x[here], w[expert].to(x.dtype))
    return out


@op()
def combine(y: Tensor, weights: Tensor) -> Tensor:
    """y [N, k, d], weights [N, k] -> [N, d]: the weighted sum"""
    return (y * weights.unsqueeze(-1)).sum(1)


@op()
def mean_expert(w: Tensor) -> Tensor:
    """w [E, o, i] -> the mean [o, i], taken in float32 at least"""
    wide = w.float() if w.dtype in (torch.float16, torch.bfloat16) else w
    return wide.mean(0).to(w.dtype)


@op()
def first_copy(y: Tensor) -> Tensor:
    """y [N, 1, d] -> [N, d]: of a token that runs through one expert"""
    return y[:, 0]


@op()
def largest(scores: Tensor) -> Tensor:
    """scores [..., E] -> the number of the largest [...]"""
    return scores.argmax(-1)
