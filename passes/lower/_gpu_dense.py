"""Matrices of bfloat16 on a GPU: torch's product, or the kernel of two in four where so many are zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effc.compiler.checkpoint import TensorRef
from effc.compiler.model import Model
from effc.compiler.weights import LazyTensor
from effc.kernels import epilogue
from effc.kernels.gpu.launches import Room
from effc.kernels.gpu.load import load
from effc.kernels.sparse_linear import emit_triton as sparse_triton
from effc.kernels.sparse_linear.layout_gpu import pack
from effc.kernels.sparse_linear.spec_gpu import TwoOfFourSpec, refuses
from effc.passes.lower._jobs import Matrix, Unlowered
from effc.passes.lower._launching import Launching, Product

ROWS_READ = 64
"""Rows of a matrix that tell of most whether they are sparse."""


def dense(build: Launching, matrix: Matrix, chain: tuple[str, ...], why: str) -> Product:
    """The product of one matrix.

    Raises:
        Unlowered: it is blocks on a diagonal.
    """
    if matrix.parts:
        raise Unlowered(f"`{matrix.unit}` is {matrix.parts} blocks on a diagonal, which no launch multiplies")
    zeros = ""
    if matrix.factor == 1.0 and two_of_four(build.model, matrix):
        spec = TwoOfFourSpec(epilogue=chain)
        zeros = refuses(spec, 1, matrix.rows, matrix.columns) or ""
        if not zeros:
            return _two_of_four(build, matrix, spec, why)
    turned = build.tensor(matrix.tensor, torch.bfloat16).t()
    turned = turned if matrix.factor == 1.0 else turned * matrix.factor
    why = why or f"zeros are read: {zeros}" if zeros else why or "the weights are not packed"
    return by_torch(turned, chain, f"{why}: torch multiplies")


def by_torch(turned: Tensor, chain: tuple[str, ...], why: str) -> Product:
    """x [M, K] times [K, N], with what torch fuses."""

    def run(room: Room, x: int, out: Tensor | None, **given: Tensor) -> Tensor:
        rows = room.values[x]
        if not chain:
            return torch.mm(rows, turned, out=out)
        if chain == ("residual",):
            return torch.addmm(given["residual"], rows, turned, out=out)
        y = epilogue.apply(chain, torch.mm(rows, turned).float(), given)
        return y.to(rows.dtype) if out is None else out.copy_(y)

    return Product("dense_linear", run, (), why)


def two_of_four(model: Model, matrix: Matrix) -> bool:
    """Whether two at least of every four columns are zero; of the first rows, where weights are in a file.

    A matrix of zeros alone is none: it is about to be trained.
    """
    w = model.tensors()[matrix.tensor].detach()
    if matrix.columns % 4 or (w.is_meta and matrix.tensor not in model.weights):
        return False
    if w.is_meta:
        return _pairs(_first_rows(model.weights[matrix.tensor]))
    return _pairs(w[:: max(1, len(w) // ROWS_READ)]) and _pairs(w)


def _pairs(rows: Tensor) -> bool:
    there = (rows != 0).view(len(rows), -1, 4).sum(-1)
    return 1 <= int(there.max()) <= 2


def _first_rows(held: LazyTensor) -> Tensor:
    if held.stored is None:
        return held.read()[:ROWS_READ]
    ref = TensorRef(held.stored.file, held.stored.offset, held.nbytes, held.dtype, held.shape)
    return ref.read((0, min(ROWS_READ, held.shape[0])))


def _two_of_four(build: Launching, matrix: Matrix, spec: TwoOfFourSpec, why: str) -> Product:
    held = build.made(lambda: pack(build.tensor(matrix.tensor, torch.bfloat16))._asdict())
    module = load(sparse_triton.emit(spec))

    def run(room: Room, x: int, out: Tensor | None, **given: Any) -> Tensor:
        y: Tensor = module.launch(room.values[x], **held, **given, n=matrix.rows, out=out)
        return y

    return Product("sparse_linear", run, (spec,), why)
