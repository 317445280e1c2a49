"""The definition in plain torch, token by token, at the precision of what it is given; differentiable."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    starts: Tensor,
    past: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """q [T, H, K], k [T, Hk, K], v [T, Hk, V], log gates g [T, Hk, K or 1] -> o [T, H, V], last states.

    Sequence b is tokens starts[b] to starts[b + 1]; its state [Hk, K, V] begins at past[b], or at zero.
    """
    group = q.shape[1] // k.shape[1]
    outputs, last = [], []
    for b, (begin, end) in enumerate(pairwise(starts.tolist())):
        state = k.new_zeros(k.shape[1], k.shape[2], v.shape[2]) if past is None else past[b]
        for t in range(begin, end):
            state = state * g[t].exp().unsqueeze(-1) + k[t].unsqueeze(-1) * v[t].unsqueeze(-2)
            each = q[t].unflatten(0, (-1, group))  # [Hk, H / Hk, K]
            outputs.append((each @ state).flatten(0, 1) * scale)
        last.append(state)
    y = torch.stack(outputs) if outputs else q.new_zeros(0, q.shape[1], v.shape[2])
    return y, torch.stack(last)
