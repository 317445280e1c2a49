"""byte_linear on a GPU, as the checks of kernels/gpu/check.py see it: the definition and its cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from effc.kernels.byte_linear.emit_triton import emit
from effc.kernels.byte_linear.layout import DTYPES, pack, quantize_rows
from effc.kernels.byte_linear.spec import ByteLinearSpec
from effc.kernels.epilogue import apply, operands
from effc.kernels.gpu.check import Case
from effc.kernels.quant_linear.spec_gpu import Tile

__all__ = ["cases", "emit", "launches", "parse", "reference"]


def parse(data: Mapping[str, Any]) -> ByteLinearSpec:
    return ByteLinearSpec.model_validate(data)


def reference(
    spec: ByteLinearSpec,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    given: Mapping[str, Tensor],
) -> Tensor:
    """x [M, K] bfloat16, codes [N, K], scales [N, G], zeros [N, G] uint8 -> y [M, N] float32.

    x becomes bytes as the kernel makes them; from there on sums are in float64.
    """
    q, rows = quantize_rows(spec.kind, x)
    wide = codes.double().view(codes.shape[0], spec.groups(codes.shape[1]), -1)
    if spec.bits == 4:
        wide = wide - (8.0 if zeros is None else zeros.double().unsqueeze(-1))
    w = (wide * scales.double().unsqueeze(-1)).view(codes.shape)
    y = (q.double() @ w.t()) * rows.double()[:, None]
    return apply(spec.epilogue, y.float(), given)


def cases(spec: ByteLinearSpec) -> Iterator[Case]:
    """Rows fewer than a tile's and more; channels and shares of columns that do not divide."""
    for at, tile in enumerate(spec.tiles):
        for m in (5, 17) if at == 0 else (17,):
            yield _case(spec, tile, m, n=tile.bn + 36, turns=3, seed=100 * at + m)


def launches(spec: ByteLinearSpec) -> Iterator[Case]:
    """Every tile at sizes that are multiples of 16 where a matrix has them so."""
    for tile in spec.tiles:
        yield _case(spec, tile, 16, n=256, turns=4, seed=0)


def _case(spec: ByteLinearSpec, tile: Tile, m: int, n: int, turns: int, seed: int) -> Case:
    k = turns * max(spec.columns, spec.group)
    dice = torch.Generator().manual_seed(seed)
    if spec.bits == 4:
        codes = torch.randint(0, 16, (n, k), generator=dice, dtype=torch.uint8)
        codes[0], codes[1] = 0, 15
    elif spec.kind == "int8":
        codes = torch.randint(-128, 128, (n, k), generator=dice, dtype=torch.int8)
        codes[0], codes[1] = -128, 127
    else:
        codes = (torch.randn(n, k, generator=dice) * 100).clamp(-448, 448).to(DTYPES["float8"])
    groups = spec.groups(k)
    kind = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[spec.scale]
    scales = (torch.rand(n, groups, generator=dice) * 0.02 + 0.01).to(kind)
    scales[2] = 0
    zeros = torch.randint(0, 16, (n, groups), generator=dice, dtype=torch.uint8)
    packed = pack(spec, codes, scales, zeros)
    x = torch.randn(m, k, generator=dice).bfloat16()
    x[1] *= 200
    x[2] = 0
    x[3] = 1
    shapes = {"bias": (n,), "gate": (m, n), "residual": (m, n), "row_scale": (m,)}
    more = {name: torch.randn(shapes[name], generator=dice) for name in operands(spec.epilogue)}
    more = {name: value if name == "row_scale" else value.bfloat16() for name, value in more.items()}
    given: dict[str, Any] = {"x": x, "words": packed.words, "scales": packed.scales, "n": n, **more}
    if packed.zeros is not None:
        given["zeros"] = packed.zeros
    given["tile"] = (tile.bm, tile.bn, tile.warps, tile.stages, tile.split)
    label = f"{tile.bm}x{tile.bn} w{tile.warps} s{tile.stages} split{tile.split}, M={m}"

    def due() -> dict[str, Tensor]:
        return {"out": reference(spec, x, codes, scales, None if spec.symmetric else zeros, more)}

    return Case(label, given, due, tolerance=2e-6, weights=tile.bn * spec.columns)
