"""Integers of 1 to 8 bits as a little-endian bit stream: value k of a row fills bits k*b to k*b + b - 1.

Shapes: R rows, C values in a row, b bits a value; a row takes ceil(C * b / 8) bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 22
"""Values that are widened to 64 bits at once; bounds the memory of packing."""


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of one row of `count` values."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes [R, C] uint8, each below 2**bits -> stream [R, ceil(C * bits / 8)] uint8."""
    rows, count = codes.shape
    if bits == 8:
        return codes.contiguous()
    out = torch.zeros(rows, packed_bytes(count, bits), dtype=torch.uint8, device=codes.device)
    step = max(1, _CHUNK // max(1, count))
    for start in range(0, rows, step):
        part = codes[start : start + step]
        out[start : start + step] = _pack_rows(part, bits)[:, : out.shape[1]]
    return out


def unpack(stream: Tensor, bits: int, count: int) -> Tensor:
    """stream [R, ceil(count * bits / 8)] uint8 -> codes [R, count] uint8."""
    if bits == 8:
        return stream
    if bits in (1, 2, 4):
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=stream.device)
        wide = (stream.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
        return wide.flatten(1)[:, :count]
    rows = stream.shape[0]
    out = torch.empty(rows, count, dtype=torch.uint8, device=stream.device)
    step = max(1, _CHUNK // max(1, count))
    for start in range(0, rows, step):
        out[start : start + step] = _unpack_rows(stream[start : start + step], bits)[:, :count]
    return out


def _pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Eight values make one word of `bits` bytes."""
    rows, count = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -count % 8)).view(rows, -1, 8)
    word = torch.zeros(padded.shape[:2], dtype=torch.int64, device=codes.device)
    for k in range(8):
        word |= padded[..., k].to(torch.int64) << (k * bits)
    return torch.stack([((word >> (8 * k)) & 255).to(torch.uint8) for k in range(bits)], -1).flatten(1)


def _unpack_rows(stream: Tensor, bits: int) -> Tensor:
    rows, size = stream.shape
    padded = torch.nn.functional.pad(stream, (0, -size % bits)).view(rows, -1, bits)
    word = torch.zeros(padded.shape[:2], dtype=torch.int64, device=stream.device)
    for k in range(bits):
        word |= padded[..., k].to(torch.int64) << (8 * k)
    mask = (1 << bits) - 1
    return torch.stack([((word >> (k * bits)) & mask).to(torch.uint8) for k in range(8)], -1).flatten(1)
