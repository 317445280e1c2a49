"""The packed matrix as the kernels of byte_linear read it, its inverse, and rows of x as bytes.

Rows are channels, filled up to a multiple of 128 with scale 0. Codes of 8 bits lie as they are. Codes of 4
bits, less 8, stand in two's complement in 32-bit words, C / 8 words to a turn of C columns: byte b of word r
has column 4 r + b in its lower half and column C / 2 + 4 r + b in its upper one, so that a shift and a mask
bring four of them, times 16, to where four signed bytes are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from effc.kernels.byte_linear.spec import LARGEST, ByteLinearSpec, Kind
from effc.kernels.quant_linear.spec_gpu import ROWS

_SCALES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
DTYPES: dict[Kind, torch.dtype] = {"int8": torch.int8, "float8": torch.float8_e4m3fn}


class Packed(NamedTuple):
    """One matrix [N, K]; N' is N rounded up to 128."""

    words: Tensor
    """[N', K / 8] int32 with 4 bits, else [N', K] of the kind"""
    scales: Tensor
    """[G, N']"""
    zeros: Tensor | None
    """[G, N'] int8, the zero code less 8; None when symmetric"""


def pack(spec: ByteLinearSpec, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Packed:
    """codes [N, K] uint8 (4 bits) or of the kind, scales [N, G], zeros [N, G] uint8 or None -> Packed

    Raises:
        ValueError: a matrix that is not symmetric comes without zero codes.
    """
    n = codes.shape[0]
    fill = -n % ROWS
    if not spec.symmetric and zeros is None:
        raise ValueError("a matrix that is not symmetric needs zero codes")
    turned = (
        None if spec.symmetric or zeros is None else _filled(zeros.to(torch.int8) - 8, fill).t().contiguous()
    )
    spread = _filled(scales.to(_SCALES[spec.scale]), fill).t().contiguous()
    if spec.bits == 8:
        kind = DTYPES[spec.kind]
        return Packed(_filled(codes.to(kind).view(torch.uint8), fill).view(kind), spread, turned)
    low, high = (_filled(codes, fill).view(n + fill, -1, 2, spec.plane) ^ 8).unbind(2)
    return Packed((low | (high << 4)).view(n + fill, -1).contiguous().view(torch.int32), spread, turned)


def unpack(spec: ByteLinearSpec, packed: Packed, n: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of `pack`."""
    scales = packed.scales.t()[:n].contiguous()
    zeros = None if packed.zeros is None else (packed.zeros.t()[:n] + 8).to(torch.uint8)
    if spec.bits == 8:
        return packed.words[:n], scales, zeros
    both = packed.words.view(torch.uint8).view(packed.words.shape[0], -1, spec.plane)
    codes = torch.stack((both & 15, both >> 4), 2) ^ 8
    return codes.view(packed.words.shape[0], -1)[:n].contiguous(), scales, zeros


def quantize_rows(kind: Kind, x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> bytes of the kind [M, K] and scales [M] float32; a row's largest becomes the kind's."""
    wide = x.float()
    most = wide.abs().amax(-1)
    # A tensor over a tensor, because torch makes of a number over one a reciprocal, rounded twice.
    factor = torch.where(most > 0, torch.full_like(most, LARGEST[kind]) / most, 0.0)
    scaled = wide * factor[:, None]
    q = scaled.round().to(torch.int8) if kind == "int8" else scaled.to(torch.float8_e4m3fn)
    return q, most * (1.0 / LARGEST[kind])


def _filled(values: Tensor, fill: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, 0, 0, fill))
