"""The packed matrix as the C kernel reads it, and its inverse.

For each block of 64 channels, for each group of g columns: 64 scales of 16 bits; 64 zero codes of 8 bits
(when not symmetric); then for each step of `columns` columns, four vectors of 64 bytes, one for every 16
channels. Byte 4 c + t of a vector holds, for channel c, the codes of columns t, t + 4, t + 8, ... of the
step, the first in the lowest bits. With 3 bits a step has three vectors for every 16 channels: two hold the
low two bits of columns 0-15 and 16-31, the third the high bits of all 32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effc.kernels.quant_linear.spec import BLOCK, QuantLinearSpec

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def pack(spec: QuantLinearSpec, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """codes [N, K] uint8, scales [N, G], zeros [N, G] uint8 codes or None -> bytes [N' / 64, G, *] uint8.

    N' is N rounded up to 64; channels that are filled up have scale 0.
    """
    n, k = codes.shape
    groups, fill = spec.groups(k), -n % BLOCK
    width, blocks = k // groups, (n + fill) // BLOCK
    codes = torch.nn.functional.pad(codes, (0, 0, 0, fill))
    # [blocks, 4, 16 channels, groups, steps, columns] -> [blocks, groups, steps, 4, planes, 64 bytes]
    split = codes.view(blocks, 4, 16, groups, width // spec.columns, spec.columns)
    planes = _planes(spec, split.permute(0, 3, 4, 1, 2, 5))
    parts = [_bytes(scales.to(_DTYPES[spec.scale]), fill).view(blocks, BLOCK, groups, 2).transpose(1, 2)]
    if not spec.symmetric:
        if zeros is None:
            raise ValueError("a matrix that is not symmetric needs zero codes")
        parts.append(_bytes(zeros, fill).view(blocks, BLOCK, groups, 1).transpose(1, 2))
    parts.append(planes)
    return torch.cat([part.reshape(blocks, groups, -1) for part in parts], 2).contiguous()


def columns(spec: QuantLinearSpec, packed: Tensor) -> int:
    """K of a packed matrix [N' / 64, G, *]."""
    head = BLOCK * (2 if spec.symmetric else 3)
    return packed.shape[1] * (packed.shape[2] - head) * 8 // (BLOCK * spec.bits)


def unpack(spec: QuantLinearSpec, packed: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of `pack`: codes [N, K] uint8, scales [N, G], zeros [N, G] uint8 or None."""
    blocks, groups, size = packed.shape
    head = BLOCK * (2 if spec.symmetric else 3)
    width = (size - head) * 8 // (BLOCK * spec.bits)
    scales = packed[:, :, : 2 * BLOCK].contiguous().view(_DTYPES[spec.scale]).transpose(1, 2)
    zeros = None if spec.symmetric else packed[:, :, 2 * BLOCK : head].transpose(1, 2).reshape(-1, groups)[:n]
    vectors = {3: 3}.get(spec.bits, 1)
    body = packed[:, :, head:].reshape(blocks, groups, width // spec.columns, 4, vectors, 16, 4)
    if spec.bits == 3:
        low = torch.cat([_spread(body[:, :, :, :, i], 2, 4) for i in (0, 1)], -1)
        split = low | (_spread(body[:, :, :, :, 2], 1, 8) << 2)
    else:
        split = _spread(body[:, :, :, :, 0], spec.bits, 8 // spec.bits)
    codes = split.permute(0, 3, 4, 1, 2, 5).reshape(blocks * BLOCK, groups * width)
    return codes[:n].contiguous(), scales.reshape(-1, groups)[:n].contiguous(), zeros


def _planes(spec: QuantLinearSpec, split: Tensor) -> Tensor:
    """[..., 16 channels, columns] codes -> [..., vectors, 64] bytes"""
    if spec.bits == 3:
        low = [_gather(half & 3, 2) for half in (split[..., :16], split[..., 16:])]
        made = torch.stack([*low, _gather(split >> 2, 1)], -3)
    else:
        made = _gather(split, spec.bits).unsqueeze(-3)
    return made


def _gather(codes: Tensor, bits: int) -> Tensor:
    """[..., 16, 4 P] codes -> [..., 16, 4] bytes, P = 8 / bits codes a byte."""
    plane = codes.reshape(*codes.shape[:-1], 8 // bits, 4)
    shifts = torch.arange(8 // bits, dtype=torch.uint8).mul(bits).unsqueeze(-1)
    return (plane << shifts).sum(-2, dtype=torch.uint8)


def _spread(packed: Tensor, bits: int, planes: int) -> Tensor:
    """[..., 16, 4] bytes -> [..., 16, 4 P] codes"""
    shifts = torch.arange(planes, dtype=torch.uint8).mul(bits).unsqueeze(-1)
    return ((packed.unsqueeze(-2) >> shifts) & ((1 << bits) - 1)).flatten(-2)


def _bytes(values: Tensor, fill: int) -> Tensor:
    """[N, G] of any type -> [N + fill, G, bytes of one] uint8, filled with zeros."""
    padded = torch.nn.functional.pad(values, (0, 0, 0, fill)).contiguous()
    return padded.view(torch.uint8).view(*padded.shape, -1)
