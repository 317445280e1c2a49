"""Slices of a feed-forward block: which channels fire, which make an expert, and the weights that they have.

Shapes: scores [E, f] of f channels on E domains, common [R] and own [E, O] numbers of channels, a [N, f]
inputs of `down`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effc.compiler.blocks.carved import Carved
from effc.compiler.blocks.mlp import MLP
from effc.passes._dense import finite
from effc.passes.moe._ffn import parameter

SHARES = (1.0, 0.8, 0.6, 0.4, 0.2)
"""Parts of an expert's size at which a token's strongest channels are compared with it."""


class Fires:
    """Mean |a| of each of f channels."""

    def __init__(self, channels: int) -> None:
        self.total = torch.zeros(channels, dtype=torch.float64)
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """x [N, f]"""
        self.total += x.detach().abs().sum(0, dtype=torch.float64).cpu()
        self.rows += len(x)

    def state(self) -> dict[str, Tensor]:
        return {"total": self.total, "rows": torch.tensor(self.rows)}

    def mean(self) -> Tensor:
        """[f] float64, in parts of the mean over channels."""
        whole = self.total.mean()
        return self.total / whole if whole > 0 else torch.ones_like(self.total)


def slices(scores: Tensor, common: int, own: int) -> tuple[Tensor, Tensor]:
    """The channels with the largest mean score, and each domain's best of the others; rising numbers."""
    shared = _best(scores.mean(0), common)
    rest = scores.clone()
    rest[:, shared] = -torch.inf
    return shared, torch.stack([_best(row, own) for row in rest])


def _best(row: Tensor, size: int) -> Tensor:
    return row.sort(descending=True, stable=True).indices[:size].sort().values


def sliced(dense: MLP, unit: Carved, common: Tensor, own: Tensor) -> Carved:
    """Fill a carved block with the channels of a dense one."""
    for name in ("gate", "up", "down") if dense.gated else ("up", "down"):
        weight: Tensor = getattr(dense, name).weight.detach()
        finite(name, weight)
        rows = weight.t() if name == "down" else weight
        for part, channels in (("shared", common), ("experts", own)):
            if channels.numel():
                taken = rows[channels]
                taken = taken.transpose(-1, -2) if name == "down" else taken
                getattr(getattr(unit, part), name).weight = parameter(taken.contiguous())
    unit.channels.common = common.to(torch.int32)
    unit.channels.own = own.to(torch.int32)
    return unit


def members(unit: Carved, hidden: int) -> Tensor:
    """Which channels of the dense block each expert has, the common ones included: [E, f] float."""
    found = torch.zeros(unit.n_experts, hidden)
    found[:, unit.channels.common.long()] = 1.0
    return found.scatter(1, unit.channels.own.long(), 1.0)


def overlap(a: Tensor, member: Tensor) -> Tensor:
    """a [N, f], member [E, f] -> how much of a token's strongest channels each expert has, [N, E].

    The strongest m, 0.8 m, ... 0.2 m channels are taken, m the size of an expert; the shares of them that the
    expert has add up.
    """
    size = int(member[0].sum())
    order = a.abs().topk(size, dim=-1).indices
    hits = torch.stack([row[order] for row in member], 1).cumsum(-1)
    counts = [max(1, int(share * size)) for share in SHARES]
    return torch.stack([hits[..., n - 1] / n for n in counts]).sum(0)
