"""Which layers of a student are held to which of its teacher, and how far apart two streams are.

Shapes: B sequences, T tokens, d width, n layers of the student, N of the teacher.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Match = Literal["uniform", "tail"]
Distance = Literal["mse", "cosine", "normalized"]


def matched(match: Match, tail: int, student: int, teacher: int) -> list[tuple[int, int]]:
    """Layers held to layers. uniform: the share of depth that lies behind both is the same; tail: the last
    ones of both, counted from the end.
    """
    if match == "tail":
        last = min(tail, student, teacher)
        return [(student - last + i, teacher - last + i) for i in range(last)]
    return [(i, max(0, round((i + 1) * teacher / student) - 1)) for i in range(student)]


def distance(form: Distance, mine: Tensor, theirs: Tensor, mask: Tensor | None) -> Tensor:
    """How far streams [B, T, d] are apart, a mean over real tokens (mask [B, T] bool) -> [] float32.

    mse: the mean of (h_S - h_T)^2; normalized: that over the mean of h_T^2 of the token; cosine: 1 - cos.
    """
    a, b = mine.float(), theirs.float()
    if mask is not None:
        a, b = a[mask], b[mask]
    if form == "cosine":
        return (1 - torch.cosine_similarity(a, b, dim=-1)).mean()
    apart = (a - b).square().mean(-1)
    return (apart / b.square().mean(-1).clamp(min=1e-6)).mean() if form == "normalized" else apart.mean()
