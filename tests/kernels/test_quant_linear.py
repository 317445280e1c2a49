"""quant_linear in C: exact integer sums, the same bits on every instruction set and any number of threads."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from effc.kernels.cpu.isa import Isa, available
from effc.kernels.quant_linear.call import quant_linear
from effc.kernels.quant_linear.layout import pack, unpack
from effc.kernels.quant_linear.reference import quantize_rows, reference, sums
from effc.kernels.quant_linear.spec import QuantLinearSpec, refuses

K = 256
SPECS = [
    QuantLinearSpec(bits=4, group=64),
    QuantLinearSpec(bits=4, group=32, symmetric=False, epilogue=("bias", "gelu", "residual")),
    QuantLinearSpec(bits=8, group=0, scale="bfloat16"),
    QuantLinearSpec(bits=8, group=128, symmetric=False, paired=True, epilogue=("silu", "row_scale")),
    QuantLinearSpec(bits=3, group=64, epilogue=("relu", "mul")),
    QuantLinearSpec(bits=2, group=256, symmetric=False, epilogue=("gelu_tanh",)),
]


class Case:
    """Random codes and what belongs to them, packed; `n` results a row, which need not divide into blocks."""

    def __init__(self, spec: QuantLinearSpec, n: int, k: int = K, seed: int = 0) -> None:
        self.spec, self.n, self.dice = spec, n, torch.Generator().manual_seed(seed)
        rows = 2 * n if spec.paired else n
        groups = spec.groups(k)
        self.codes = torch.randint(0, 2**spec.bits, (rows, k), generator=self.dice, dtype=torch.uint8)
        dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}[spec.scale]
        self.scales = (torch.rand(rows, groups, generator=self.dice) * 0.02 + 0.01).to(dtype)
        zeros = torch.randint(0, 2**spec.bits, (rows, groups), generator=self.dice, dtype=torch.uint8)
        self.zeros = None if spec.symmetric else zeros
        order = torch.arange(rows)
        if spec.paired:  # 32 rows of the first half, 32 of the second
            order = order.view(2, -1, 32).transpose(0, 1).reshape(-1)
        self.packed = pack(
            spec, self.codes[order], self.scales[order], None if self.zeros is None else self.zeros[order]
        )

    def inputs(self, m: int, k: int = K) -> tuple[Tensor, dict[str, Tensor]]:
        shapes = {"bias": (self.n,), "residual": (m, self.n), "gate": (m, self.n), "row_scale": (m,)}
        x = torch.randn(m, k, generator=self.dice)
        return x, {name: torch.randn(shape, generator=self.dice) for name, shape in shapes.items()}


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"w{s.bits}g{s.group}{'-'.join(('', *s.epilogue))}")
def test_equals_the_reference_on_every_set_and_number_of_threads(spec: QuantLinearSpec) -> None:
    case = Case(spec, n=96 if spec.paired else 150)
    for m in (1, 2, 5, 13, 23):
        x, more = case.inputs(m)
        due = reference(spec, x, case.codes, case.scales, case.zeros, more)
        found = [
            quant_linear(spec, isa, x, case.packed, case.n, more, threads)
            for isa, threads in itertools.product(available(), (1, 2))
        ]
        assert float((found[0] - due).abs().max()) <= 4e-7 * float(due.abs().max())
        for isa, pair in zip(available(), zip(found[::2], found[1::2], strict=True), strict=True):
            assert torch.equal(*pair), isa
        if Isa.AMX in available():  # the same integers, and the same arithmetic behind them
            assert torch.equal(found[0], found[2 * available().index(Isa.AVX512)])


@pytest.mark.parametrize("spec", SPECS[:1] + SPECS[2:3], ids=lambda s: f"w{s.bits}")
def test_sums_are_exact_integers(spec: QuantLinearSpec) -> None:
    """With scales of 1 and rows whose largest magnitude is 127 the result is the integer sum itself."""
    case = Case(spec, n=70)
    x = torch.randint(-127, 128, (19, K), generator=case.dice).float()
    x.view(19, spec.groups(K), -1)[..., 0] = 127.0
    packed = pack(spec, case.codes, torch.ones_like(case.scales), case.zeros)
    xq, _ = quantize_rows(x, spec.groups(K))
    exact = sums(spec, xq, case.codes, case.zeros).sum(-1)
    assert int(exact.abs().max()) < 2**24  # every step is a whole number that float32 holds
    for isa in available():
        assert torch.equal(quant_linear(spec, isa, x, packed, 70, {}, 2).long(), exact), isa


def test_extremes_and_zero_rows() -> None:
    """The largest codes against the largest bytes, where sums of 16 bits would pass their range."""
    for bits in (2, 3, 4, 8):
        spec = QuantLinearSpec(bits=bits, group=64)
        codes = torch.full((64, K), 2**bits - 1, dtype=torch.uint8)
        packed = pack(spec, codes, torch.ones(64, spec.groups(K)), None)
        x = torch.full((5, K), -127.0)
        x[1] = 0.0
        due = x[:, 0] * (2 ** (bits - 1) - 1) * K
        for isa in available():
            y = quant_linear(spec, isa, x, packed, 64, {}, 1)
            assert torch.allclose(y, due[:, None].expand(5, 64), rtol=1e-6, atol=0), (bits, isa)


def test_a_row_does_not_depend_on_the_others_and_nan_stays_in_its_row() -> None:
    case = Case(SPECS[0], n=64)
    x, _ = case.inputs(9)
    alone = torch.cat(
        [quant_linear(SPECS[0], available()[0], r[None].contiguous(), case.packed, 64, {}, 1) for r in x]
    )
    x[4, 7], x[5] = float("nan"), 1e30
    together = quant_linear(SPECS[0], available()[0], x, case.packed, 64, {}, 2)
    keep = [0, 1, 2, 3, 6, 7, 8]
    assert torch.equal(alone[keep], together[keep])
    assert bool(together[4].isnan().all())


@settings(max_examples=25, deadline=None)
@drawn(
    bits=st.sampled_from([2, 3, 4, 8]),
    groups=st.integers(1, 3),
    n=st.integers(1, 130),
    seed=st.integers(0, 99),
)
def test_unpacking_undoes_packing(bits: int, groups: int, n: int, seed: int) -> None:
    spec = QuantLinearSpec(bits=bits, group=32, symmetric=seed % 2 == 0)  # type: ignore[arg-type]
    case = Case(spec, n, k=32 * groups, seed=seed)
    codes, scales, zeros = unpack(spec, case.packed, n)
    assert torch.equal(codes, case.codes)
    assert torch.equal(scales, case.scales)
    assert zeros is None if case.zeros is None else torch.equal(zeros, case.zeros)
    assert case.packed.numel() == spec.bytes(n, 32 * groups)


def test_what_cannot_be_is_refused_in_words() -> None:
    with pytest.raises(ValidationError, match="a multiple of 32 at 3 bits"):
        QuantLinearSpec(bits=3, group=16)
    with pytest.raises(ValidationError, match="no epilogue is called swish"):
        QuantLinearSpec(bits=4, group=64, epilogue=("swish",))
    assert "not a multiple of the group" in str(refuses(SPECS[0], 64, 96))
    assert "pass 32 bits" in str(refuses(QuantLinearSpec(bits=8, group=0), 64, 2**18))
    assert refuses(SPECS[0], 64, 128) is None


def test_every_set_is_known_to_the_processor_that_runs_it() -> None:
    assert available()[-1] is Isa.PORTABLE
