"""Planes of signs on a GPU: the kernel's scales from those that are stored."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from effc.kernels.binary_planes import emit_triton as planes_triton
from effc.kernels.binary_planes.layout_gpu import pack
from effc.kernels.binary_planes.spec_gpu import BinaryPlanesGpuSpec, refuses
from effc.kernels.gpu.launches import Room
from effc.kernels.gpu.load import load
from effc.passes.lower import _weights as weights
from effc.passes.lower._gpu_dense import by_torch
from effc.passes.lower._jobs import Matrix
from effc.passes.lower._launching import Launching, Product


def planes(build: Launching, matrix: Matrix, chain: tuple[str, ...], why: str) -> Product:
    """Signs unpacked in registers; where no kernel takes them, one matrix that torch multiplies."""
    spec = _spec(matrix, chain)
    words = spec if isinstance(spec, str) else refuses(spec, 1, matrix.rows, matrix.columns)
    if isinstance(spec, str) or words:
        made = build.made(lambda: {"w": weights.dense(build.model, matrix)[1]()})
        turned = made.get("w", torch.empty(0, 0)).to(torch.bfloat16).t()
        return by_torch(turned, chain, f"planes are read as one matrix, as {words}: torch multiplies")
    held = build.made(lambda: _packed(build, matrix, spec))
    module = load(planes_triton.emit(spec))

    def run(room: Room, x: int, out: Tensor | None, **given: Any) -> Tensor:
        y: Tensor = module.launch(x=room.values[x], **held, **given, n=matrix.rows, out=out)
        return y

    return Product("binary_planes", run, (spec,), why)


def _spec(matrix: Matrix, chain: tuple[str, ...]) -> BinaryPlanesGpuSpec | str:
    """The kernel, or in words why there is none. A scale of one power of two is a bfloat16 number."""
    assert matrix.planes is not None
    count, down, across, terms = matrix.planes
    given: dict[str, Any] = {"planes": count, "epilogue": chain}
    given |= {"scale": {0: "float16", 1: "bfloat16"}.get(terms, "float32")}
    if across == matrix.columns and down < matrix.rows:
        given |= {"side": "columns", "share": matrix.rows // down if down > 1 else 0}
    else:  # rows that share scales each have them
        given |= {"side": "rows", "share": matrix.columns // across if across > 1 else 0}
    try:
        return BinaryPlanesGpuSpec(**given)
    except ValidationError as error:
        return error.errors()[0]["msg"].removeprefix("Value error, ")


def _packed(build: Launching, matrix: Matrix, spec: BinaryPlanesGpuSpec) -> dict[str, Tensor]:
    unit: Any = build.model.module(matrix.unit)
    scales = unit.scales
    if spec.side == "rows":
        scales = scales.repeat_interleave(matrix.rows // unit.down, 2)
    return pack(spec, unit.signs, scales, matrix.columns)._asdict()
