"""multi_lora in C, as the checks of kernels/cpu/check.py see it: its cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from effc.kernels.cpu.case import Argument, Case
from effc.kernels.cpu.stored import DTYPES
from effc.kernels.multi_lora.emit_c import emit
from effc.kernels.multi_lora.reference import example, reference
from effc.kernels.multi_lora.spec import MultiLoraSpec

__all__ = ["cases", "emit", "parse"]


def parse(data: Mapping[str, Any]) -> MultiLoraSpec:
    return MultiLoraSpec.model_validate(data)


def cases(spec: MultiLoraSpec) -> Iterator[Case]:
    """Mixed ranks, rows without an adapter, widths that fill no vector; one adapter for one row."""
    for ranks, m, k, n in (((5, 1, 16), 9, 77, 70), ((3,), 1, 64, 128), ((8, 2), 6, 7, 5)):
        x, adapters, index, base = example(ranks, m, k, n, DTYPES[spec.factor], seed=m)
        x, base = x.float(), base.float()
        if m == 1:
            index[0] = 0
        a, b, edges, scales = adapters
        given: dict[str, Argument] = {"x": x, "a": a, "b": b, "edges": edges, "scales": scales}
        given |= {"index": index, "base": base, "h": torch.empty(m, max(ranks)), "y": torch.empty(m, n)}
        given |= {"M": m, "N": n, "K": k, "most": max(ranks)}
        due = reference(x, adapters, index, base)
        yield Case(f"{m} rows, ranks {ranks}", given, {"y": due}, 2e-6, ("h",))
