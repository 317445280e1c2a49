"""embed in C: the same numbers as the definition, from dense and packed tables, with all that is added."""

from __future__ import annotations

import itertools

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from effc.kernels.cpu.isa import available
from effc.kernels.cpu.stored import DTYPES
from effc.kernels.embed.call import embed
from effc.kernels.embed.reference import dense, reference
from effc.kernels.embed.spec import EmbedSpec
from effc.kernels.quant_linear.layout import pack
from effc.kernels.quant_linear.spec import QuantLinearSpec

DENSE = [
    EmbedSpec(),
    EmbedSpec(table="bfloat16", scale=27.75, positions="bfloat16", position_offset=2, types="float32"),
    EmbedSpec(table="float16", positions="float32"),
]
PACKED = [
    QuantLinearSpec(bits=4, group=32),
    QuantLinearSpec(bits=8, group=0, symmetric=False, scale="bfloat16"),
    QuantLinearSpec(bits=3, group=64),
    QuantLinearSpec(bits=2, group=16, symmetric=False),
]


@pytest.mark.parametrize("spec", DENSE, ids=lambda s: s.table)
def test_equals_the_reference_on_every_set_and_number_of_threads(spec: EmbedSpec) -> None:
    dice = torch.Generator().manual_seed(3)
    for m, d in ((1, 64), (9, 45)):
        table = torch.randn(31, d, generator=dice).to(DTYPES[spec.table or ""])
        positions = None if spec.positions is None else torch.randn(20, d, generator=dice)
        positions = positions if positions is None else positions.to(DTYPES[spec.positions or ""])
        types = torch.randn(d, generator=dice) if spec.types else None
        ids, place = (torch.randint(0, n, (m,), generator=dice) for n in (31, 18))
        due = reference(spec, ids, table, place, positions, types)
        for isa, threads in itertools.product(available(), (1, 2)):
            x = embed(spec, isa, ids, table, d, threads, place, positions, types)
            # one rounding less where a product and a sum are fused
            torch.testing.assert_close(x, due, rtol=0, atol=4e-6 if spec.scale != 1.0 else 0)


@pytest.mark.parametrize("layout", PACKED, ids=lambda s: f"w{s.bits}g{s.group}")
def test_a_row_of_the_packed_table_is_its_exact_numbers(layout: QuantLinearSpec) -> None:
    dice = torch.Generator().manual_seed(5)
    v, d = 150, 128
    groups = layout.groups(d)
    codes = torch.randint(0, 2**layout.bits, (v, d), generator=dice, dtype=torch.uint8)
    scales = torch.rand(v, groups, generator=dice).to(DTYPES[layout.scale])
    zeros = torch.randint(0, 2**layout.bits, (v, groups), generator=dice, dtype=torch.uint8)
    packed = pack(layout, codes, scales, None if layout.symmetric else zeros)
    spec = EmbedSpec(table=None, packed=layout)
    ids = torch.cat([torch.tensor([0, 15, 16, 63, 64, v - 1]), torch.randint(0, v, (9,), generator=dice)])
    base = torch.full_like(zeros, layout.mid) if layout.symmetric else zeros
    wide = codes.view(v, groups, -1).double() - base.unsqueeze(-1).double()
    due = (wide * scales.unsqueeze(-1).double()).view(v, d)[ids]
    assert torch.equal(dense(spec, packed)[ids].double(), due)
    for isa in available():
        assert torch.equal(embed(spec, isa, ids, packed, d, 2).double(), due), isa


def test_what_cannot_be_is_refused_in_words() -> None:
    with pytest.raises(ValidationError, match="either stored as numbers or packed"):
        EmbedSpec(table=None)
    with pytest.raises(ValidationError, match="cannot be looked up as one table"):
        EmbedSpec(table=None, packed=QuantLinearSpec(bits=4, group=32, paired=True, epilogue=("silu",)))
    table: Tensor = torch.zeros(4, 16)
    with pytest.raises(IndexError, match="rows 4 to 4 of a table of 4"):
        embed(EmbedSpec(), available()[0], torch.tensor([4]), table, 16, 1)
