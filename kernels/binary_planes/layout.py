"""Signs and scales as the C kernel reads them: words of 32 columns, 64 rows side by side.

Canonical: signs [P, N, ceil(K / 8)] uint8, scales [P, t, A, B] (compiler/planes.py). Laid out: words
[N / 64, K / 32, P, 64] of 32 bits, filled up with zeros; with side = columns scales [P, t, A, K'], filled up
with zero to whole words, and with side = rows [N / 64, B, P, t, 64], where a block's are in one piece.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from effc.compiler.planes import NONE
from effc.kernels.binary_planes.spec import BLOCK, STRIDE, BinaryPlanesSpec

_BYTES = STRIDE // 8


def pack(spec: BinaryPlanesSpec, signs: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """-> words [blocks, strides, P, 64] int32 and scales as the kernel reads them, both contiguous."""
    _, n, size = signs.shape
    wide = F.pad(signs, (0, -size % _BYTES, 0, -n % BLOCK)).contiguous()
    words = wide.view(torch.int32).unflatten(1, (-1, BLOCK)).permute(1, 3, 0, 2).contiguous()
    if spec.side == "columns":
        none = 0 if spec.scale == "float16" else NONE
        return words, F.pad(scales, (0, -scales.shape[-1] % STRIDE), value=none).contiguous()
    rows = F.pad(scales, (0, 0, 0, -n % BLOCK)).unflatten(2, (-1, BLOCK))
    return words, rows.permute(2, 4, 0, 1, 3).contiguous()


def unpack(spec: BinaryPlanesSpec, words: Tensor, scales: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
    """What `pack` was given, of a matrix [n, k]."""
    wide = words.permute(2, 0, 3, 1).flatten(1, 2).contiguous().view(torch.uint8)
    signs = wide[:, :n, : -(-k // 8)].contiguous()
    if spec.side == "columns":
        return signs, scales[..., :k].contiguous()
    return signs, scales.permute(2, 3, 0, 4, 1).flatten(2, 3)[:, :, :n].contiguous()
