"""The definition in plain torch, at the precision of what it is given: each sequence by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    begin: Tensor,
    end: Tensor,
    paths: Sequence[Sequence[int]],
    scale: float,
    cap: float | None = None,
) -> Tensor:
    """q [B, H, D], k and v [P, Hk, D], segments begin to end [S], their path for each of B -> o [B, H, D].

    What sees no key gives 0. Scores are brought between -cap and cap where there is one.
    """
    found = []
    for b, path in enumerate(paths):
        at = torch.cat([torch.arange(int(begin[s]), int(end[s])) for s in path] or [torch.empty(0).long()])
        keys, values = (t[at].repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        scores = torch.einsum("hd,khd->hk", q[b], keys) * scale
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        found.append(torch.einsum("hk,khd->hd", scores.softmax(-1), values))
    return torch.stack(found)
