"""quant_linear on a GPU, as the checks of kernels/gpu/check.py see it: the definition and its cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from effc.kernels.epilogue import apply, operands
from effc.kernels.gpu.check import Case
from effc.kernels.quant_linear.emit_triton import emit
from effc.kernels.quant_linear.layout_gpu import pack
from effc.kernels.quant_linear.spec_gpu import ROWS, Tile, WeightOnlySpec

__all__ = ["cases", "emit", "launches", "parse", "reference"]


def parse(data: Mapping[str, Any]) -> WeightOnlySpec:
    return WeightOnlySpec.model_validate(data)


def reference(
    spec: WeightOnlySpec,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    given: Mapping[str, Tensor],
) -> Tensor:
    """x [M, K] bfloat16, codes [N, K] uint8, scales [N, G], zeros [N, G] uint8 -> y [M, N] float32.

    `given` holds the operands of the epilogue, and inner and outer where the spec has an extension.
    The kernel rounds sums to float32 and its result once; here sums are in float64.
    """
    groups = spec.groups(codes.shape[1])
    wide = codes.double().view(codes.shape[0], groups, -1)
    zero = float(spec.mid) if zeros is None else zeros.double().unsqueeze(-1)
    w = ((wide - zero) * scales.double().unsqueeze(-1)).view(codes.shape)
    y = x.double() @ w.t()
    if spec.extension:
        inner = x.double() @ given["factor"].double().t() if spec.within else given["inner"].double()
        y = y + inner @ given["outer"][: codes.shape[0]].double().t()
    return apply(spec.epilogue, y.float(), given)


def cases(spec: WeightOnlySpec) -> Iterator[Case]:
    """Rows fewer than a tile's, as many and more; channels and shares of columns that do not divide."""
    for at, tile in enumerate(spec.tiles):
        for m in (1, 5, 16, 17) if at == 0 else (17,):
            yield _case(spec, tile, m, n=tile.bn + 36, turns=3, seed=100 * at + m)


def launches(spec: WeightOnlySpec) -> Iterator[Case]:
    """Every tile at sizes that are multiples of 16 where a matrix has them so."""
    for tile in spec.tiles:
        yield _case(spec, tile, 5, n=256, turns=4, seed=0)


def _case(spec: WeightOnlySpec, tile: Tile, m: int, n: int, turns: int, seed: int) -> Case:
    k = turns * max(spec.columns, spec.group)
    if spec.bits == 3:  # the last turn is not whole
        k = -(-(turns * spec.columns - spec.run) // (spec.group or spec.run)) * (spec.group or spec.run)
    dice = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << spec.bits, (n, k), generator=dice, dtype=torch.uint8)
    codes[0], codes[1] = 0, (1 << spec.bits) - 1
    groups = spec.groups(k)
    kind = {"float16": torch.float16, "bfloat16": torch.bfloat16}[spec.scale]
    scales = (torch.rand(n, groups, generator=dice) * 0.02 + 0.01).to(kind)
    scales[2] = 0
    zeros = torch.randint(0, 1 << spec.bits, (n, groups), generator=dice, dtype=torch.uint8)
    packed = pack(spec, codes, scales, zeros)
    x = torch.randn(m, k, generator=dice).bfloat16()
    shapes = {"bias": (n,), "gate": (m, n), "residual": (m, n), "row_scale": (m,)}
    more = {name: torch.randn(shapes[name], generator=dice) for name in operands(spec.epilogue)}
    more = {name: value if name == "row_scale" else value.bfloat16() for name, value in more.items()}
    if spec.extension:
        outer = torch.zeros(-(-n // ROWS) * ROWS, spec.extension)
        outer[:n] = torch.randn(n, spec.extension, generator=dice)
        if spec.within:
            more["factor"] = (torch.randn(spec.extension, k, generator=dice) / k**0.5).bfloat16()
        else:
            more["inner"] = torch.randn(m, spec.extension, generator=dice).bfloat16()
        more["outer"] = outer.bfloat16()
    given: dict[str, Any] = {"x": x, "words": packed.words, "scales": packed.scales, "n": n, **more}
    if packed.zeros is not None:
        given["zeros"] = packed.zeros
    if spec.sums and seed % 2:  # from the kernel before, else made by `launch`
        given["xsum"] = x.float().view(m, -1, spec.run).sum(-1).t().contiguous()
    given["tile"] = (tile.bm, tile.bn, tile.warps, tile.stages, tile.split)
    label = f"{tile.bm}x{tile.bn} w{tile.warps} s{tile.stages} split{tile.split}, M={m}"

    def due() -> dict[str, Tensor]:
        return {"out": reference(spec, x, codes, scales, None if spec.symmetric else zeros, more)}

    return Case(label, given, due, tolerance=2e-5, weights=tile.bn * spec.columns)
