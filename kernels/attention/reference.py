"""The definition in plain torch, at the precision of what it is given."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from effc.kernels.attention.spec import AttentionGpuSpec


def reference(
    spec: AttentionGpuSpec, q: Tensor, k: Tensor, v: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor]:
    """q [T, H, h], k and v [T, Hk, h], starts [B + 1] -> o [T, H, h], and [H, T], log2 of the sums.

    Sequence b is tokens starts[b] to starts[b + 1].
    """
    edges = starts.tolist()
    parts, sums = [], []
    for begin, end in pairwise(edges):
        n = end - begin
        keys, values = (t[begin:end].repeat_interleave(spec.group, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[begin:end], keys) * spec.scale
        if spec.cap is not None:
            scores = spec.cap * torch.tanh(scores / spec.cap)
        seen = torch.ones(n, n, dtype=torch.bool)
        if spec.causal:
            seen = seen.tril()
        if spec.window is not None:
            seen = seen.triu(1 - spec.window)
        scores = scores.masked_fill(~seen, -torch.inf)
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        sums.append(scores.logsumexp(-1) / torch.log(torch.tensor(2.0)).to(scores))
    return torch.cat(parts), torch.cat(sums, 1)
