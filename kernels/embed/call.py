"""Run the C kernel of embed on torch tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from effc.kernels.cpu.entry import launch
from effc.kernels.cpu.isa import Isa
from effc.kernels.embed.emit_c import emit
from effc.kernels.embed.spec import EmbedSpec


def embed(
    spec: EmbedSpec,
    isa: Isa,
    ids: Tensor,
    table: Tensor,
    width: int,
    threads: int,
    place: Tensor | None = None,
    positions: Tensor | None = None,
    types: Tensor | None = None,
) -> Tensor:
    """ids and place [M] int64, table [V, D] or packed, positions [P, D], types [D] -> x [M, D] float32.

    Raises:
        IndexError: an id or a place lies outside its table.
    """
    rows = table.shape[0] * (1 if spec.packed is None else 64)
    _inside(ids, rows)
    if positions is not None and place is not None:
        _inside(place + spec.position_offset, positions.shape[0])
    x = torch.empty(len(ids), width)
    launch(
        emit(spec), spec.op, isa, threads, ids, place, table, positions, types, x, len(ids), width
    )  # fmt: skip
    return x


def _inside(index: Tensor, rows: int) -> None:
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < rows:
        raise IndexError(f"rows {int(index.min())} to {int(index.max())} of a table of {rows}")
