"""linear_attention in C, as the checks of kernels/cpu/check.py see it: its cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from effc.kernels.cpu.case import Argument, Case
from effc.kernels.linear_attention.emit_c import emit
from effc.kernels.linear_attention.reference_c import blocked, prepare, recur
from effc.kernels.linear_attention.spec_c import RecurrentSpec

__all__ = ["cases", "emit", "parse"]


def parse(data: Mapping[str, Any]) -> RecurrentSpec:
    return RecurrentSpec.model_validate(data)


def cases(spec: RecurrentSpec) -> Iterator[Case]:
    """A prompt beside another that goes on, then a token of each; what a new sequence finds is no number."""
    dice = torch.Generator().manual_seed(spec.key_dim)
    states = torch.full((2, spec.kv_heads, spec.key_dim, spec.value_dim), torch.nan, dtype=torch.float64)
    h, hk, k, v = spec.heads, spec.kv_heads, spec.key_dim, spec.value_dim
    plans = [[(0, 0), (0, 1), (1, 0), (0, 2), (1, 1)], [(1, 2)], [(0, 3), (1, 0)]]
    for plan in plans:
        slot, position = torch.tensor(plan).T.contiguous()
        m = len(plan)
        q, keys, values, x = (
            torch.randn(m, size, generator=dice) * 2
            for size in (h * k, hk * k, hk * v, hk * spec.gates * spec.pool)
        )
        gains = torch.randn(2, k, generator=dice) if spec.norm else None
        before = blocked(spec, states).float()
        exact = (gains[0].double(), gains[1].double()) if gains is not None else None
        rows = prepare(spec, q.double(), keys.double(), values.double(), x.double(), exact)
        due = recur(spec, rows, slot, position, states)
        given: dict[str, Argument] = {"q": q, "k": keys, "v": values, "x": x}
        given |= {"q_gain": gains[0] if gains is not None else None}
        given |= {"k_gain": gains[1] if gains is not None else None, "slot": slot, "position": position}
        given |= {"states": before, "queries": torch.empty(m, h * k), "keys": torch.empty(m, hk * k)}
        given |= {"values": torch.empty(m, hk * v), "decay": torch.empty(m, hk * spec.gates)}
        scratch = ["queries", "keys", "values", "decay"]
        if spec.residual:  # what is there is given, and cannot be poisoned
            there = torch.randn(m, h * v, generator=dice)
            due = due + there
            given |= {"y": there, "M": m}
            yield Case(f"{m} rows", given, {}, 3e-6, scratch)
        else:
            yield Case(f"{m} rows", given | {"y": torch.empty(m, h * v), "M": m}, {"y": due}, 3e-6, scratch)
