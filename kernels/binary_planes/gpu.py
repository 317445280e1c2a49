"""binary_planes on a GPU, as the checks of kernels/gpu/check.py see it: its cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from effc.compiler.planes import dense
from effc.kernels.binary_planes.emit_triton import emit
from effc.kernels.binary_planes.layout_gpu import pack
from effc.kernels.binary_planes.reference import example
from effc.kernels.binary_planes.spec import BinaryPlanesSpec
from effc.kernels.binary_planes.spec_gpu import TURN, BinaryPlanesGpuSpec
from effc.kernels.epilogue import apply, operands
from effc.kernels.gpu.check import Case
from effc.kernels.quant_linear.spec_gpu import Tile

__all__ = ["cases", "emit", "launches", "parse"]


def parse(data: Mapping[str, Any]) -> BinaryPlanesGpuSpec:
    return BinaryPlanesGpuSpec.model_validate(data)


def cases(spec: BinaryPlanesGpuSpec) -> Iterator[Case]:
    """Rows fewer than a tile's and more; channels and shares of columns that do not divide."""
    for at, tile in enumerate(spec.tiles):
        for m in (5, 17) if at == 0 else (17,):
            n = tile.bn + 36 if spec.side == "rows" or not spec.share else 2 * spec.share
            yield _case(spec, tile, m, n, turns=3 if spec.share <= TURN else 2, seed=100 * at + m)


def launches(spec: BinaryPlanesGpuSpec) -> Iterator[Case]:
    for tile in spec.tiles:
        yield _case(spec, tile, 5, n=256, turns=4, seed=0)


def _case(spec: BinaryPlanesGpuSpec, tile: Tile, m: int, n: int, turns: int, seed: int) -> Case:
    k = turns * (max(TURN, spec.share) if spec.side == "rows" else TURN)
    kind = "float16" if spec.scale == "float16" else "pow2"
    stored = BinaryPlanesSpec(planes=spec.planes, side=spec.side, share=spec.share, scale=kind)
    x, signs, scales = example(stored, m, n, k, seed)
    x = x.bfloat16()
    packed = pack(spec, signs, scales, k)
    dice = torch.Generator().manual_seed(seed)
    shapes = {"bias": (n,), "gate": (m, n), "residual": (m, n), "row_scale": (m,)}
    more = {name: torch.randn(shapes[name], generator=dice) for name in operands(spec.epilogue)}
    more = {name: value if name == "row_scale" else value.bfloat16() for name, value in more.items()}
    given: dict[str, Any] = {"x": x, "words": packed.words, "scales": packed.scales, "n": n, **more}
    given["tile"] = (tile.bm, tile.bn, tile.warps, tile.stages, tile.split)

    def due() -> dict[str, Tensor]:
        y = (x.double() @ dense(signs, scales, k).double().T).float()
        return {"out": apply(spec.epilogue, y, more)}

    exact = spec.side == "rows" or kind == "pow2"
    label = f"{tile.bm}x{tile.bn} w{tile.warps} s{tile.stages} split{tile.split}, M={m}"
    return Case(label, given, due, 2e-5 if exact else 4e-3, weights=tile.bn * TURN)
