"""sparse_linear in C: the bits of the dense kernel from fewer bytes, on every set and by any members."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effc.kernels.cpu.check import wrong
from effc.kernels.cpu.entry import launch
from effc.kernels.cpu.isa import available
from effc.kernels.quant_linear import layout as dense
from effc.kernels.quant_linear.call import quant_linear
from effc.kernels.quant_linear.reference import quantize_rows
from effc.kernels.quant_linear.spec import QuantLinearSpec
from effc.kernels.sparse_linear import cpu
from effc.kernels.sparse_linear.emit_c import emit
from effc.kernels.sparse_linear.layout import PAST, pack, unpack
from effc.kernels.sparse_linear.spec import SparseLinearSpec, refuses

EIGHT = SparseLinearSpec(packed=QuantLinearSpec(bits=8, group=64))
WHOLE = SparseLinearSpec(packed=QuantLinearSpec(bits=8, group=0, scale="bfloat16"))
PAIR = QuantLinearSpec(bits=8, group=0, paired=True, epilogue=("silu", "row_scale"))
CHAIN = QuantLinearSpec(bits=8, group=64, epilogue=("bias", "gelu", "residual"))
SETS = {"paired": (PAIR, available()[:1]), "chain": (CHAIN, available()[-3:])}
"""Kernels, and the sets of instructions that each is compiled for."""


@pytest.mark.parametrize("name", SETS)
def test_equals_its_definition_by_any_number_of_members(name: str) -> None:
    packed, sets = SETS[name]
    found = {isa: wrong(cpu, SparseLinearSpec(packed=packed), None, isa) for isa in sets}
    assert found == dict.fromkeys(found, "")


@pytest.mark.parametrize("spec", [EIGHT, WHOLE])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 9])
def test_bits_are_those_of_the_dense_kernel(spec: SparseLinearSpec, m: int) -> None:
    one, n, k = spec.packed, 130, 256
    codes, scales = cpu.example(spec, n, k, 3)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
    isa = available()[0]
    due = quant_linear(one, isa, x, dense.pack(one, codes, scales, None), n, {}, 1)
    assert torch.equal(sparse_linear(spec, x, codes, scales), due)


def sparse_linear(spec: SparseLinearSpec, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """x [M, K], codes [N, K], scales [N, G] -> y [M, N]"""
    (m, k), n, one = x.shape, codes.shape[0], spec.packed
    xq, xs = quantize_rows(x, one.groups(k))
    sums = xq.view(m, one.groups(k), -1).sum(-1, dtype=torch.int32)
    y = torch.empty(m, n)
    launch(
        emit(spec), spec.op, available()[0], 1, xq, xs, sums, *pack(spec, codes, scales), y, m, n, k,
        -(-n // 64),
    )  # fmt: skip
    return y


@pytest.mark.parametrize("spec", [EIGHT, WHOLE])
def test_unpacking_undoes_packing_and_bytes_are_as_predicted(spec: SparseLinearSpec) -> None:
    codes, scales = cpu.example(spec, 64, 128, 0)
    codes = codes[::2].repeat_interleave(2, 0)  # two of four in every row
    sparse = pack(spec, codes, scales)
    found = unpack(spec, sparse, 64)
    assert torch.equal(found[0], codes)
    assert torch.equal(found[1], scales)
    zeros = float((codes == spec.packed.mid).float().mean())
    stored = sum(t.numel() * t.element_size() for t in (sparse.scales, sparse.bits, sparse.codes)) - PAST
    assert stored == spec.bytes(64, 128, zeros)
    assert stored < spec.packed.bytes(64, 128)
    odd, least = cpu.example(spec, 70, 2 * spec.packed.group or 20, 1), 70
    assert torch.equal(unpack(spec, pack(spec, *odd), least)[0], odd[0])


def test_what_is_not_worth_it_is_refused_in_words() -> None:
    assert refuses(EIGHT, 4096, 4096, 0.5) is None
    assert "10% of zeros leave" in str(refuses(EIGHT, 4096, 4096, 0.1))
    assert "K = 4000 is not a multiple" in str(refuses(EIGHT, 4096, 4000, 0.5))
    with pytest.raises(ValueError, match="where the grid is symmetric"):
        SparseLinearSpec(packed=QuantLinearSpec(bits=8, group=64, symmetric=False))
    with pytest.raises(ValueError, match="codes of 4 bits"):
        SparseLinearSpec(packed=QuantLinearSpec(bits=4, group=64))
