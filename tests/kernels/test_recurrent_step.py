"""Recurrences in C: each its definition on every set of instructions, the same bits by any members."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from effc.kernels import recurrent_cell
from effc.kernels.cpu.check import wrong
from effc.kernels.cpu.isa import available
from effc.kernels.linear_attention import cpu
from effc.kernels.linear_attention.reference_c import prepare, recur
from effc.kernels.linear_attention.spec_c import RecurrentSpec, refuses
from effc.kernels.recurrent_cell import RecurrentCellSpec

GLA = RecurrentSpec(heads=3, kv_heads=3, key_dim=20, value_dim=37, divisor=16.0, scale=0.25)
SPECS = {
    "vector gates": GLA,
    "one gate a head": GLA.model_copy(update={"shared": True}),
    "shared keys, softmax, norms": RecurrentSpec(
        heads=6, kv_heads=2, key_dim=24, value_dim=24, divisor=16.0, q="softmax", k="softmax", norm=1e-6
    ),
    "1 - a as keys": RecurrentSpec(
        heads=2, kv_heads=1, key_dim=16, value_dim=9, divisor=1.0, q="softmax", k="entry"
    ),
    "1 - a as values": RecurrentSpec(
        heads=5, kv_heads=1, key_dim=33, value_dim=6, divisor=16.0, over="value", v="entry", pool=4
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_equals_its_definition_on_every_set_and_number_of_members(name: str) -> None:
    found = {isa: wrong(cpu, SPECS[name], None, isa) for isa in available()}
    assert found == dict.fromkeys(found, "")


@pytest.mark.parametrize("cell", ["gru", "lstm_cifg"])
def test_a_cell_equals_its_definition_on_every_set_and_number_of_members(cell: Literal["gru"]) -> None:
    spec = RecurrentCellSpec(cell=cell, width=37)
    found = {isa: wrong(recurrent_cell, spec, None, isa) for isa in available()}
    assert found == dict.fromkeys(found, "")


def test_the_definition_is_the_recurrence_of_the_paper() -> None:
    """One head, by hand: two tokens of one sequence."""
    spec = RecurrentSpec(heads=1, kv_heads=1, key_dim=2, value_dim=1, divisor=2.0)
    q, k, v, x = (torch.randn(2, n, dtype=torch.float64) for n in (2, 2, 1, 2))
    states = torch.full((1, 1, 2, 1), torch.nan, dtype=torch.float64)
    rows = prepare(spec, q, k, v, x, None)
    y = recur(spec, rows, torch.zeros(2, dtype=torch.long), torch.arange(2), states)
    first = torch.outer(k[0], v[0])
    second = torch.diag(x[1].sigmoid().sqrt()) @ first + torch.outer(k[1], v[1])
    torch.testing.assert_close(y, torch.stack([q[0] @ first, q[1] @ second]))
    torch.testing.assert_close(states[0, 0], second)


def test_what_cannot_be_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="3 query heads do not divide over 2"):
        RecurrentSpec(heads=3, kv_heads=2, key_dim=8, value_dim=8, divisor=1.0)
    with pytest.raises(ValueError, match="1 - a has no channel for each of v's"):
        RecurrentSpec(heads=2, kv_heads=2, key_dim=8, value_dim=8, divisor=1.0, v="entry")
    wide = RecurrentSpec(heads=34, kv_heads=2, key_dim=8, value_dim=8, divisor=1.0)
    assert "17 query heads" in str(refuses(wide))
    assert refuses(GLA) is None
    assert GLA.bytes(2) == 4 * 2 * 3 * 3 * 20 * 16
