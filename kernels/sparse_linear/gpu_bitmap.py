"""sparse_linear of any zeros on a GPU, as the checks of kernels/gpu/check.py see it: its cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from effc.kernels.epilogue import apply, operands
from effc.kernels.gpu.check import Case
from effc.kernels.quant_linear.spec_gpu import Tile
from effc.kernels.sparse_linear.bitmap_triton import emit
from effc.kernels.sparse_linear.layout_bitmap import pack
from effc.kernels.sparse_linear.spec_bitmap import MIDDLE, SECTION, WORD, BitmapSpec

__all__ = ["cases", "emit", "example", "launches", "parse"]


def parse(data: Mapping[str, Any]) -> BitmapSpec:
    return BitmapSpec.model_validate(data)


def example(spec: BitmapSpec, n: int, k: int, seed: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """w [n, k] bfloat16 or codes, scales [n, G] of codes, and what they stand for, float64.

    Rows of half zeros, of few and of many; one with none, one with nothing else.
    """
    dice = torch.Generator().manual_seed(seed)
    share = torch.tensor([0.5, 0.1, 0.9, 0.5])[torch.arange(n) % 4]
    zero = torch.rand(n, k, generator=dice) < share[:, None]
    zero[0], zero[-1] = False, True
    if spec.values == "bfloat16":
        w = torch.randn(n, k, generator=dice).bfloat16().masked_fill(zero, 0)
        return w, None, w.double()
    codes = torch.randint(0, 256, (n, k), generator=dice, dtype=torch.uint8).masked_fill(zero, MIDDLE)
    kind = torch.float16 if spec.scale == "float16" else torch.bfloat16
    scales = (torch.rand(n, spec.groups(k), generator=dice) * 0.02 + 0.01).to(kind)
    wide = (codes.double() - MIDDLE).view(n, spec.groups(k), -1) * scales.double().unsqueeze(-1)
    return codes, scales, wide.view(n, k)


def cases(spec: BitmapSpec) -> Iterator[Case]:
    """Rows fewer than a tile's and more; ragged channels; a last section that is not whole."""
    step = spec.group or WORD
    k = -(-(SECTION + 3 * WORD) // step) * step
    for tile in spec.tiles:
        for m in (5, tile.bm + 1):
            yield _case(spec, tile, m, n=tile.bn + 36, k=k, seed=m)


def launches(spec: BitmapSpec) -> Iterator[Case]:
    """Every tile at sizes that are multiples of 16."""
    for tile in spec.tiles:
        yield _case(spec, tile, 16, n=256, k=max(2 * SECTION, spec.group), seed=0)


def _case(spec: BitmapSpec, tile: Tile, m: int, n: int, k: int, seed: int) -> Case:
    w, scales, wide = example(spec, n, k, seed)
    dice = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=dice).bfloat16()
    shapes = {"bias": (n,), "gate": (m, n), "residual": (m, n), "row_scale": (m,)}
    more = {name: torch.randn(shapes[name], generator=dice).bfloat16() for name in operands(spec.epilogue)}
    packed = {name: t for name, t in pack(spec, w, scales)._asdict().items() if t is not None}
    numbers = (tile.bm, tile.bn, tile.warps, tile.stages, tile.split)
    given: dict[str, Any] = {"x": x, **packed, "n": n, **more, "tile": numbers}
    label = f"{tile.bm}x{tile.bn} w{tile.warps} s{tile.stages} split{tile.split}, M={m}"

    def due() -> dict[str, Tensor]:
        return {"out": apply(spec.epilogue, (x.double() @ wide.t()).float(), more)}

    return Case(label, given, due, tolerance=2e-5, weights=tile.bn * SECTION)
