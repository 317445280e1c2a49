"""Signs and scales as the Triton kernel reads them, and back.

A row of a plane is 32-bit words, 8 to a turn of 256 columns. Bit j of word r of a turn holds the sign of
column 16 j + 2 r, bit 16 + j that of the next: one shift and one logic operation bring two signs to where two
bfloat16 numbers have theirs. Rows are filled up to a multiple of 128. Scales are [P, B, N'] where rows have
them, [P, A, K] where columns do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from effc.compiler.planes import scale_values, unpack_signs
from effc.kernels.binary_planes.spec_gpu import PLACE, TURN, BinaryPlanesGpuSpec
from effc.kernels.quant_linear.spec_gpu import ROWS

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class Packed(NamedTuple):
    """One matrix [N, K]; N' is N rounded up to 128."""

    words: Tensor
    """[P, N', K / 32] int32"""
    scales: Tensor
    """[P, B, N'] or [P, A, K]"""


def pack(spec: BinaryPlanesGpuSpec, signs: Tensor, scales: Tensor, k: int) -> Packed:
    """Stored signs [P, N, ceil(k / 8)] and scales [P, t, A, B] (compiler/planes.py) -> Packed

    Raises:
        ValueError: a scale is no number of the dtype that the spec stores.
    """
    fill = -signs.shape[1] % ROWS
    up = torch.nn.functional.pad((unpack_signs(signs, k) > 0).long(), (0, 0, 0, fill))
    # [P, N', turns, places, words, halves]
    places = _places().to(signs.device)
    words = (up.unflatten(2, (k // TURN, 16, PLACE // 2, 2)) << places).sum((3, 5)).flatten(2)
    values = scale_values(scales)
    stored = values.to(_DTYPES[spec.scale])
    if not torch.equal(stored.float(), values):
        raise ValueError(f"scales that {spec.scale} does not hold; float32 holds every stored one")
    if spec.side == "rows":
        stored = torch.nn.functional.pad(stored.transpose(1, 2), (0, fill))
    return Packed(torch.where(words >= 2**31, words - 2**32, words).int(), stored.contiguous())


def unpack(spec: BinaryPlanesGpuSpec, packed: Packed, n: int) -> tuple[Tensor, Tensor]:
    """The inverse of `pack`: signs [P, n, K] int8 of -1 and 1, scales [P, A, B] float32."""
    words = packed.words[:, :n].long().unflatten(2, (-1, 1, PLACE // 2, 1))
    signs = 2 * ((words >> _places()) & 1).to(torch.int8).flatten(2) - 1
    scales = packed.scales.float()
    return signs, scales[:, :, :n].transpose(1, 2) if spec.side == "rows" else scales


def _places() -> Tensor:
    """[places, 1, halves]: the bit of each column"""
    return torch.arange(16).view(-1, 1, 1) + torch.tensor([0, 16])
