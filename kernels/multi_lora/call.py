"""Run the C kernel of multi_lora on torch tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from effc.kernels.cpu.entry import launch
from effc.kernels.cpu.isa import Isa
from effc.kernels.multi_lora.emit_c import emit
from effc.kernels.multi_lora.layout import Adapters
from effc.kernels.multi_lora.spec import MultiLoraSpec


def multi_lora(
    spec: MultiLoraSpec, isa: Isa, x: Tensor, adapters: Adapters, index: Tensor, base: Tensor, threads: int
) -> Tensor:
    """x [M, K] and base [M, N] float32, index [M] int64 (the number of adapters for none) -> y [M, N].

    Raises:
        IndexError: a row has an adapter that there is not.
    """
    (m, k), n, most = x.shape, base.shape[1], max(1, adapters.rank)
    last = len(adapters.scales) - 1
    if m and not 0 <= int(index.min()) <= int(index.max()) <= last:
        raise IndexError(f"adapters {int(index.min())} to {int(index.max())} of {last}, {last} being none")
    y = torch.empty_like(base)
    launch(
        emit(spec), spec.op, isa, threads, x, adapters.a, adapters.b, adapters.first, adapters.scales, index,
        base, torch.empty(m, most), y, m, n, k, most,
    )  # fmt: skip
    return y
