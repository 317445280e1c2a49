"""multi_lora in C: the definition, mixed ranks and rows without an adapter, the same bits by any members."""

from __future__ import annotations

import itertools

import pytest
import torch

from effc.kernels.cpu.isa import available
from effc.kernels.multi_lora.call import multi_lora
from effc.kernels.multi_lora.layout import pack, unpack
from effc.kernels.multi_lora.reference import example, reference
from effc.kernels.multi_lora.spec import MultiLoraSpec


@pytest.mark.parametrize("factor", ["float32", "bfloat16"])
def test_equals_the_reference_on_every_set_and_number_of_threads(factor: str) -> None:
    spec, kind = MultiLoraSpec.model_validate({"factor": factor}), getattr(torch, factor)
    x, adapters, index, base = example((5, 1, 16), 9, 77, 70, kind, seed=4)
    x, base = x.float(), base.float()
    assert int((index == 3).sum()) > 0
    due = reference(x, adapters, index, base)
    for isa in available():
        one, two = (multi_lora(spec, isa, x, adapters, index, base, n) for n in (1, 2))
        assert float((one - due).abs().max()) <= 2e-6 * float(due.abs().max())
        assert torch.equal(one, two)
        assert torch.equal(one[index == 3], base[index == 3])


def test_a_row_does_not_depend_on_the_others_and_nan_stays_in_its_row() -> None:
    spec, isa = MultiLoraSpec(), available()[0]
    x, adapters, index, base = example((4, 8), 6, 40, 33, torch.float32, seed=1)
    rows = [(x[m : m + 1], index[m : m + 1], base[m : m + 1]) for m in range(6)]
    alone = torch.cat([multi_lora(spec, isa, a, adapters, i, b, 1) for a, i, b in rows])
    index[2] = 0
    x[2] = float("nan")
    together = multi_lora(spec, isa, x, adapters, index, base, 2)
    kept = [0, 1, 3, 4, 5]
    assert torch.equal(alone[kept], together[kept])
    assert bool(together[2].isnan().all())


def test_unpacking_undoes_packing() -> None:
    factors = [(torch.randn(r, 6), torch.randn(9, r), float(r)) for r in (3, 1, 4)]
    adapters = pack(factors)
    assert adapters.rank == 4
    for due, found in itertools.zip_longest(factors, unpack(adapters)):
        assert torch.equal(due[0], found[0])
        assert torch.equal(due[1], found[1])
        assert due[2] == found[2]


def test_what_cannot_be_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="no adapters"):
        pack([])
    with pytest.raises(ValueError, match=r"adapter 1 has factors \[2, 7\]"):
        pack([(torch.zeros(2, 6), torch.zeros(9, 2), 1.0), (torch.zeros(2, 7), torch.zeros(9, 2), 1.0)])
    x, adapters, index, base = example((4, 8), 6, 40, 33, torch.float32, seed=1)
    index[0] = 3
    with pytest.raises(IndexError, match=r"adapters 0 to 3 of 2|adapters 1 to 3 of 2"):
        multi_lora(MultiLoraSpec(), available()[0], x, adapters, index, base, 1)
