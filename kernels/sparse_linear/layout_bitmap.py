"""Bits and numbers as the Triton kernel reads them, and the inverse.

Bit b of word w of a row says whether column 32 w + b is stored. A program reads sections of 256 columns of 64
or 128 rows, so the numbers of such a tile lie together: tile by tile of 128 rows, in it section by section,
row by row, by column. Words and starts stand by column first, so that rows side by side are read as one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effc.kernels.quant_linear.spec_gpu import ROWS
from effc.kernels.sparse_linear.spec_bitmap import MIDDLE, SECTION, WORD, BitmapSpec, padded

_SCALES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class Bitmap(NamedTuple):
    """One matrix [N, K]; N' is N rounded up to 128, K' is K rounded up to 256."""

    values: Tensor
    """bfloat16, or uint8 codes: those that are not zero, in order"""
    bits: Tensor
    """[K' / 32, N'] int32"""
    starts: Tensor
    """[K' / 256, N'] int32: where the numbers of a row's section begin"""
    scales: Tensor | None = None
    """[K / group, N'] half precision, of codes"""

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self if t is not None)


def pack(spec: BitmapSpec, w: Tensor, scales: Tensor | None = None) -> Bitmap:
    """w [N, K] bfloat16, or codes uint8 of a symmetric grid with scales [N, G] -> Bitmap

    Raises:
        ValueError: w is of another type than the spec's values, or codes come without scales.
    """
    kind = torch.bfloat16 if spec.values == "bfloat16" else torch.uint8
    if w.dtype != kind or (scales is None) != (spec.values == "bfloat16"):
        raise ValueError(f"values of {spec.values} are {kind}, and codes alone have scales; w is {w.dtype}")
    n, k = w.shape
    fill = -n % ROWS
    none = 0 if spec.values == "bfloat16" else MIDDLE
    wide = F.pad(w, (0, padded(k) - k, 0, fill), value=none)
    kept = wide != none
    bits = (kept.view(n + fill, -1, WORD).long() << torch.arange(WORD)).sum(-1)
    words = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32)
    sections = kept.view(-1, ROWS, padded(k) // SECTION, SECTION).transpose(1, 2)
    counts = sections.sum(-1)
    starts = (counts.flatten().cumsum(0) - counts.flatten()).view(counts.shape).transpose(0, 1)
    values = wide.view(-1, ROWS, padded(k) // SECTION, SECTION).transpose(1, 2)[sections]
    held = None if scales is None else F.pad(scales.to(_SCALES[spec.scale]), (0, 0, 0, fill)).t().contiguous()
    begins = starts.reshape(padded(k) // SECTION, -1).to(torch.int32).contiguous()
    return Bitmap(values.contiguous(), words.t().contiguous(), begins, held)


def unpack(spec: BitmapSpec, packed: Bitmap, n: int, k: int) -> Tensor:
    """The inverse of `pack`: w [n, k] bfloat16, or codes."""
    columns, rows = packed.bits.shape
    kept = ((packed.bits.t().long().unsqueeze(-1) >> torch.arange(WORD)) & 1).bool()
    sections = kept.reshape(-1, ROWS, columns * WORD // SECTION, SECTION).transpose(1, 2)
    none = 0 if spec.values == "bfloat16" else MIDDLE
    w = torch.full(sections.shape, none, dtype=packed.values.dtype)
    w[sections] = packed.values
    return w.transpose(1, 2).reshape(rows, -1)[:n, :k].contiguous()
