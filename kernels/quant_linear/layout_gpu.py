"""The packed matrix as the Triton kernel reads it, and its inverse.

Rows are channels, filled up to a multiple of 128 with scale 0. A row is 32-bit words; a turn of the loop
takes W = columns bits / 32 of them. Within a turn, bits [b j, b j + b) of word r hold the code of column
2 W j + 2 r, and the same bits of its upper half that of the next column: one shift and one mask bring two
codes to where two bfloat16 numbers have their lowest digits. With 3 bits five codes take a half, and rows are
filled up to whole turns with columns that x does not have. Scales and zero codes are [groups, channels].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from effc.kernels.quant_linear.spec_gpu import ROWS, WeightOnlySpec

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class Packed(NamedTuple):
    """One matrix [N, K]; N' is N rounded up to 128."""

    words: Tensor
    """[N', K bits / 32] int32; with 3 bits [N', K' / 10], K' whole turns"""
    scales: Tensor
    """[G, N'] of 16 bits"""
    zeros: Tensor | None
    """[G, N'] uint8; None when symmetric"""


def pack(spec: WeightOnlySpec, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Packed:
    """codes [N, K] uint8, scales [N, G], zeros [N, G] uint8 codes or None -> Packed

    Raises:
        ValueError: a matrix that is not symmetric comes without zero codes.
    """
    n, k = codes.shape
    fill = -n % ROWS
    wide = torch.nn.functional.pad(codes, (0, spec.padded(k) - k, 0, fill))
    planes = wide.view(n + fill, -1, spec.planes, spec.plane // 2, 2).long()
    words = (planes << _shifts(spec).to(planes.device)).sum((2, 4)).view(n + fill, -1)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    if not spec.symmetric and zeros is None:
        raise ValueError("a matrix that is not symmetric needs zero codes")
    turned = None if spec.symmetric or zeros is None else _filled(zeros, fill).t().contiguous()
    return Packed(words, _filled(scales.to(_DTYPES[spec.scale]), fill).t().contiguous(), turned)


def unpack(spec: WeightOnlySpec, packed: Packed, n: int, k: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of `pack`: codes [n, k] uint8, scales [n, G], zeros [n, G] uint8 or None."""
    rows = packed.words.shape[0]
    words = packed.words.view(rows, -1, 1, spec.plane // 2, 1).long()
    codes = ((words >> _shifts(spec)) & ((1 << spec.bits) - 1)).to(torch.uint8).view(rows, -1)
    zeros = None if packed.zeros is None else packed.zeros.t()[:n].contiguous()
    return codes[:n, :k].contiguous(), packed.scales.t()[:n].contiguous(), zeros


def _shifts(spec: WeightOnlySpec) -> Tensor:
    """[planes, 1, 2]: where in its word each code of a plane and of a half lies."""
    low = torch.arange(spec.planes).mul(spec.bits).view(-1, 1, 1)
    return low + torch.tensor([0, 16])


def _filled(values: Tensor, fill: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, 0, 0, fill))
