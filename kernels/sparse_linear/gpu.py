"""sparse_linear on a GPU, as the checks of kernels/gpu/check.py see it: the definition and its cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from effc.kernels.epilogue import apply, operands
from effc.kernels.gpu.check import Case
from effc.kernels.quant_linear.spec_gpu import Tile
from effc.kernels.sparse_linear.emit_triton import emit
from effc.kernels.sparse_linear.layout_gpu import by_members, pack
from effc.kernels.sparse_linear.spec_gpu import COLUMNS, TURNS, TwoOfFourSpec

__all__ = ["cases", "emit", "example", "launches", "parse"]


def parse(data: Mapping[str, Any]) -> TwoOfFourSpec:
    return TwoOfFourSpec.model_validate(data)


def example(n: int, k: int, seed: int) -> Tensor:
    """w [n, k] bfloat16: all pairs of places; some quads with one number or none."""
    dice = torch.Generator().manual_seed(seed)
    quads = torch.randn(n, k // 4, 4, generator=dice).bfloat16()
    kept = torch.rand(quads.shape, generator=dice).topk(2, dim=-1).indices
    w = torch.zeros_like(quads).scatter_(-1, kept, quads.gather(-1, kept))
    w[torch.rand(n, k // 4, generator=dice) < 0.1] = 0
    w[..., 1][torch.rand(n, k // 4, generator=dice) < 0.2] = 0
    return w.view(n, k)


def cases(spec: TwoOfFourSpec) -> Iterator[Case]:
    """Rows fewer than a tile's and more; ragged channels; a last block that is not whole."""
    for tile in spec.tiles:
        for m in (5, tile.bm + 1):
            yield _case(spec, tile, m, n=tile.bn + 36, k=(TURNS + 1) * COLUMNS, seed=m)


def launches(spec: TwoOfFourSpec) -> Iterator[Case]:
    """Every tile at sizes that are multiples of 16."""
    for tile in spec.tiles:
        yield _case(spec, tile, 16, n=256, k=2 * TURNS * COLUMNS, seed=0)


def _case(spec: TwoOfFourSpec, tile: Tile, m: int, n: int, k: int, seed: int) -> Case:
    w = example(n, k, seed)
    dice = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=dice).bfloat16()
    shapes = {"bias": (n,), "gate": (m, n), "residual": (m, n), "row_scale": (m,)}
    more = {name: torch.randn(shapes[name], generator=dice).bfloat16() for name in operands(spec.epilogue)}
    ordered = seed % 2 == 0
    given: dict[str, Any] = {**pack(w)._asdict(), "n": n, **more, "ordered": ordered}
    given |= {"x": by_members(x) if ordered else x}
    given["tile"] = (tile.bm, tile.bn, tile.warps, tile.stages, tile.split)
    label = f"{tile.bm}x{tile.bn} w{tile.warps} s{tile.stages} split{tile.split}, M={m}"

    def due() -> dict[str, Tensor]:
        return {"out": apply(spec.epilogue, (x.double() @ w.double().t()).float(), more)}

    return Case(label, given, due, tolerance=2e-5, weights=tile.bn * COLUMNS * TURNS)
