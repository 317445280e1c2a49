"""The experts' matrices as the Triton kernels read them: gate and up in one, and the packed forms stacked."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from effc.kernels.grouped_linear.spec_gpu import PAIR, GroupedLinearSpec
from effc.kernels.quant_linear.layout_gpu import pack


class Stack(NamedTuple):
    """One matrix of each expert, N channels."""

    words: Tensor
    """[E, N', K bits / 32] int32, or [E, N, K] bfloat16"""
    scales: Tensor | None
    """[E, G, N']; None with bfloat16"""
    zeros: Tensor | None
    """[E, G, N'] uint8; None when symmetric"""


def together(gate: Tensor, up: Tensor) -> Tensor:
    """gate and up [E, F, ...] -> [E, 2 F, ...]: 64 rows of gate, then the 64 of up, and so on."""
    e, f, *rest = gate.shape
    blocks = (e, f // PAIR, PAIR, *rest)
    return torch.stack((gate.view(blocks), up.view(blocks)), 2).view(e, 2 * f, *rest).contiguous()


def apart(both: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `together`."""
    e, n, *rest = both.shape
    gate, up = both.view(e, n // (2 * PAIR), 2, PAIR, *rest).unbind(2)
    return gate.reshape(e, n // 2, *rest), up.reshape(e, n // 2, *rest)


def stack(spec: GroupedLinearSpec, w: Tensor, scales: Tensor | None, zeros: Tensor | None) -> Stack:
    """w [E, N, K] bfloat16, or codes uint8 with scales [E, N, G] and zeros [E, N, G] or None -> Stack

    Raises:
        ValueError: codes come without scales.
    """
    if spec.packed is None:
        return Stack(w.bfloat16().contiguous(), None, None)
    if scales is None:
        raise ValueError("codes need scales")
    each = [
        pack(spec.packed, w[e], scales[e], None if zeros is None else zeros[e]) for e in range(w.shape[0])
    ]
    turned = None if spec.symmetric else torch.stack([p.zeros for p in each if p.zeros is not None])
    return Stack(torch.stack([p.words for p in each]), torch.stack([p.scales for p in each]), turned)
