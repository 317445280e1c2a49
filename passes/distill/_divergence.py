"""Distances between the next-token distributions of teacher and student, row by row.

Shapes: z_S, z_T [n, V] float32 logits -> [n] nats. p = softmax(z_T / t), q = softmax(z_S / t), t temperature.
Every distance is multiplied by t^2, so that its gradient keeps its size when t changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]


def divergence(direction: str, temperature: float, beta: float) -> Distance:
    """The distance between teacher and student that `direction` names, as a function of (z_S, z_T)."""
    form = {"forward": _forward, "reverse": _reverse, "jsd": _jsd, "tvd": _tvd}[direction]

    def distance(z_s: Tensor, z_t: Tensor) -> Tensor:
        logq = torch.log_softmax(z_s / temperature, -1)
        logp = torch.log_softmax(z_t.float() / temperature, -1)
        return form(logp, logq, beta) * temperature**2

    return distance


def _kl(loga: Tensor, logb: Tensor) -> Tensor:
    """KL(a || b) = sum a (log a - log b)"""
    return (loga.exp() * (loga - logb)).sum(-1)


def _forward(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    return _kl(logp, logq)


def _reverse(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    return _kl(logq, logp)


def _jsd(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q"""
    logm = torch.logaddexp(logp + math.log(beta), logq + math.log1p(-beta))
    return beta * _kl(logp, logm) + (1 - beta) * _kl(logq, logm)


def _tvd(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    """Half the absolute difference"""
    return 0.5 * (logp.exp() - logq.exp()).abs().sum(-1)
