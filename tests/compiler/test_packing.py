"""Small integers survive packing, in exactly the bytes promised; packed units compute what they hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effc.compiler.blocks import QuantEmbedding, QuantLinear, QuantStackedLinear, Unit
from effc.compiler.packing import pack, packed_bytes, unpack
from effc.compiler.step import Step


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**31))
def test_unpack_undoes_pack(bits: int, rows: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 1 << bits, (rows, count), generator=torch.Generator().manual_seed(seed))
    stream = pack(codes.to(torch.uint8), bits)
    assert stream.shape == (rows, packed_bytes(count, bits))
    assert torch.equal(unpack(stream, bits, count), codes.to(torch.uint8))


@pytest.mark.parametrize("bits", range(1, 9))
def test_value_k_fills_bits_from_k_times_b(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (1, 11), generator=torch.Generator().manual_seed(bits)).to(
        torch.uint8
    )
    stream = int.from_bytes(bytes(pack(codes, bits).flatten().tolist()), "little")
    assert [(stream >> (k * bits)) & ((1 << bits) - 1) for k in range(11)] == codes.flatten().tolist()


def units(bits: int, group: int, symmetric: bool) -> list[QuantLinear | QuantStackedLinear | QuantEmbedding]:
    grid = {"bits": bits, "group": group, "symmetric": symmetric}
    return [
        QuantLinear(in_features=24, out_features=10, **grid),
        QuantStackedLinear(experts=2, in_features=24, out_features=5, **grid),
        QuantEmbedding(vocab=10, width=24, **grid),
    ]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [0, 8, 24])
@pytest.mark.parametrize("symmetric", [True, False])
def test_units_hold_what_was_filled_in(bits: int, group: int, symmetric: bool) -> None:
    dice = torch.Generator().manual_seed(bits)
    half = 1 << (bits - 1)
    for unit in units(bits, group, symmetric):
        planned = unit.cost().bytes
        q = torch.randint(-half, half, (10, 24), generator=dice).to(torch.int8)
        scale = torch.rand(unit.grid, generator=dice) + 0.5
        zero = None if symmetric else torch.randint(-half, half, unit.grid, generator=dice).to(torch.int8)
        unit.fill(q, scale, zero)
        codes, scales, zeros = unit.unpack()
        assert torch.equal(codes, q)
        assert torch.equal(scales, scale.half())
        assert (zeros is None) == symmetric
        assert symmetric or torch.equal(zeros, zero)  # type: ignore[arg-type]
        wide = q.view(10, unit.grid[1], -1).double() - (0 if zero is None else zero.double()[..., None])
        expected = (wide * scale.half().double()[..., None]).reshape(10, 24)
        assert torch.allclose(unit.dense().double(), expected, rtol=1e-6)
        lines, groups = unit.grid
        bytes_ = (
            10 * -(-24 * bits // 8)
            + 2 * lines * groups
            + (0 if symmetric else -(-lines * groups * bits // 8))
        )
        assert unit.cost().bytes == planned == bytes_
        assert unit.cost().params == 240
        assert Unit.from_spec(unit.spec()).spec() == unit.spec()


def test_units_compute_with_their_weights() -> None:
    linear, stack, table = units(4, 8, False)
    dice = torch.Generator().manual_seed(0)
    q = torch.randint(-8, 8, (10, 24), generator=dice).to(torch.int8)
    for unit in (linear, stack, table):
        unit.fill(q, torch.full(unit.grid, 0.25), torch.zeros(unit.grid, dtype=torch.int8))
    w = q.float() / 4
    x = torch.randn(3, 24, generator=dice)
    assert torch.allclose(linear(x), x @ w.T, rtol=1e-5)
    assert torch.allclose(stack(x, 1), x @ w[5:].T, rtol=1e-5)
    ids = torch.tensor([[3, 9, 3]])
    assert torch.equal(table(ids, Step(torch.arange(3)[None])), w[ids])


@pytest.mark.parametrize(("bits", "group"), [(0, 8), (9, 8), (4, 7)])
def test_a_unit_that_cannot_be_is_refused(bits: int, group: int) -> None:
    with pytest.raises(ValueError, match=r"bits|group"):
        QuantLinear(in_features=24, out_features=10, bits=bits, group=group)
