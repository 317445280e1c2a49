"""The tensors of a program: a model's weights laid out as the kernels read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from effc.compiler.blocks.quant_linear import WHOLE
from effc.compiler.model import Model
from effc.kernels.binary_planes.layout import pack as pack_planes
from effc.kernels.binary_planes.spec import BinaryPlanesSpec
from effc.kernels.quant_linear.layout import pack
from effc.kernels.quant_linear.spec import QuantLinearSpec
from effc.kernels.quant_linear.spec_gpu import WeightOnlySpec
from effc.kernels.sparse_linear.layout import Sparse
from effc.kernels.sparse_linear.layout import pack as pack_sparse
from effc.kernels.sparse_linear.spec import SparseLinearSpec
from effc.passes.lower._jobs import Matrix

ROWS_READ = 64
"""Rows of a matrix that tell how many of its weights are zero, at least."""
MIDDLE = 128
"""The code of zero on a symmetric grid of 8 bits, as it is stored."""
HALF = 32
"""Rows of each of two matrices that lie together in a block."""

Make = Callable[[], Tensor]


def float32(model: Model, name: str) -> Make:
    """A small tensor as float32: gains, biases."""
    return lambda: model.tensors()[name].detach().float().contiguous()


def stored(model: Model, name: str) -> Make:
    """A tensor as the model holds it, not copied."""
    return lambda: model.tensors()[name].detach().contiguous()


def side_by_side(model: Model, names: Sequence[str]) -> Make:
    """Several vectors as one, float32."""
    return lambda: torch.cat([float32(model, name)() for name in names])


def packed(model: Model, spec: QuantLinearSpec, matrices: Sequence[Matrix]) -> Make:
    """The packed matrix of one unit, of several stacked, or of two in turns of 32 rows; of every expert."""

    def make() -> Tensor:
        parts = [codes(model, spec, matrix) for matrix in matrices]
        if not matrices[0].experts:
            return _joined(spec, parts)
        stacks = [[t.chunk(matrices[0].experts) for t in part] for part in parts]
        each = [[(q[e], s[e], z[e]) for q, s, z in stacks] for e in range(matrices[0].experts)]
        return torch.stack([_joined(spec, one) for one in each])

    return make


def sparse(model: Model, spec: SparseLinearSpec, matrices: Sequence[Matrix]) -> dict[str, Make]:
    """The parts of a sparse matrix by name; it is packed once for all of them and not kept."""
    held: dict[str, Tensor] = {}

    def make(part: str) -> Tensor:
        if part not in held:
            parts = [codes(model, spec.packed, matrix) for matrix in matrices]
            join = _in_turns if spec.packed.paired else torch.cat
            numbers, scales = (join([p[i] for p in parts]) for i in (0, 1))
            rows = sum(m.rows for m in matrices)
            if spec.packed.paired:  # rows that fill the turns up have no scale, and need no codes
                numbers = numbers.masked_fill((scales == 0).all(1, keepdim=True), spec.packed.mid)
                rows = len(numbers)
            held.update(pack_sparse(spec, numbers[:rows], scales[:rows])._asdict())
        return held.pop(part)

    return {part: partial(make, part) for part in Sparse._fields}


def planes(model: Model, spec: BinaryPlanesSpec, matrix: Matrix) -> dict[str, Make]:
    """Words of signs and scales by name, laid out once for both and not kept."""
    held: dict[str, Tensor] = {}

    def make(part: str) -> Tensor:
        if part not in held:
            unit: Any = model.module(matrix.unit)
            scales = unit.scales
            if spec.side == "columns":  # each column its own, where several share them
                scales = scales.repeat_interleave(matrix.columns // unit.across, -1)
            held.update(zip(("words", "scales"), pack_planes(spec, unit.signs, scales), strict=True))
        return held.pop(part)

    return {part: partial(make, part) for part in ("words", "scales")}


def dense(model: Model, matrix: Matrix) -> tuple[str, Make]:
    """Name and tensor of a dense matrix: as the model holds it, as blocks on a diagonal, or scaled."""

    def make() -> Tensor:
        if matrix.planes is not None:
            unit: Any = model.module(matrix.unit)
            whole: Tensor = unit.dense()
            return whole
        w = stored(model, matrix.tensor)()
        w = torch.block_diag(*w).contiguous() if matrix.parts else w
        return w if matrix.factor == 1.0 else w * matrix.factor

    name = matrix.tensor + (":whole" if matrix.parts or matrix.planes else "")
    return name if matrix.factor == 1.0 else f"{name}*{matrix.factor}", make


def zeros(model: Model, matrices: Sequence[Matrix]) -> float:
    """The share of zeros among codes of 8 bits, of some rows of each matrix; 0 without weights to read."""
    found = total = 0
    for matrix in matrices:
        tensor = model.tensors()[matrix.tensor]
        if tensor.is_meta:
            if matrix.tensor not in model.weights:
                return 0.0
            tensor = model.weights[matrix.tensor].read()
        some = tensor[:: max(1, tensor.shape[0] // ROWS_READ)]
        found, total = found + int((some == MIDDLE).sum()), total + some.numel()
    return found / max(1, total)


def _joined(spec: QuantLinearSpec, parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The packed matrix of codes, scales and zero codes [N, *] of several."""
    join = _in_turns if spec.paired else torch.cat
    numbers, scales = (join([p[i] for p in parts]) for i in (0, 1))
    return pack(spec, numbers, scales, None if spec.symmetric else join([p[2] for p in parts]))


def codes(
    model: Model, spec: QuantLinearSpec | WeightOnlySpec, matrix: Matrix
) -> tuple[Tensor, Tensor, Tensor]:
    """codes [N, K] uint8, scales [N, G], zero codes [N, G] uint8 of one unit."""
    unit: Any = model.module(matrix.unit)
    q, scales, zeros = unit.unpack()
    shifted = (q.to(torch.int16) + spec.mid).to(torch.uint8)
    groups = spec.groups(matrix.columns)
    if unit.group == WHOLE:
        scales = scales.expand(unit.rows, groups)
        zeros = None if zeros is None else zeros.expand(unit.rows, groups)
    zero = torch.zeros_like(scales, dtype=torch.int16) if zeros is None else zeros.to(torch.int16)
    return shifted, scales, (zero + spec.mid).to(torch.uint8)


def _in_turns(parts: Sequence[Tensor]) -> Tensor:
    """[N, *] twice -> 32 rows of the first, 32 of the second, and so on; filled up with zeros."""
    fill = -parts[0].shape[0] % HALF
    wide = [torch.nn.functional.pad(p, (0, 0, 0, fill)).view(-1, HALF, p.shape[1]) for p in parts]
    return torch.stack(wide, 1).flatten(0, 2)
