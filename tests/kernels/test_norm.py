"""norm in C against the definition in double precision, on ragged widths and every instruction set."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from effc.compiler.blocks.norm import Norm
from effc.kernels.cpu.entry import launch
from effc.kernels.cpu.isa import available
from effc.kernels.norm.call import norm
from effc.kernels.norm.emit_c import emit
from effc.kernels.norm.reference import reference
from effc.kernels.norm.spec import NormSpec

SPECS = [
    NormSpec(eps=1e-6),
    NormSpec(eps=1e-5, offset=1.0, bias=True),
    NormSpec(form="layer", eps=1e-5, bias=True),
]


def inputs(m: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    dice = torch.Generator().manual_seed(seed)
    x = torch.randn(m, d, generator=dice) * 3 + 0.5
    return x, torch.randn(d, generator=dice), torch.randn(d, generator=dice)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.form}-{s.offset}-{s.bias}")
def test_equals_the_reference_on_every_set_and_number_of_threads(spec: NormSpec) -> None:
    for m, d in ((1, 64), (3, 200), (5, 7), (40, 129)):
        x, gain, bias = inputs(m, d, seed=d)
        more = bias if spec.bias else None
        due = reference(spec, x.double(), gain.double(), None if more is None else more.double())
        for isa in available():
            one, two = (norm(spec, isa, x, gain, more, threads) for threads in (1, 2))
            assert float((one - due).abs().max()) <= 2e-6, (isa, m, d)
            assert torch.equal(one, two), isa


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.form}-{s.offset}-{s.bias}")
def test_is_what_the_block_of_the_compiler_computes(spec: NormSpec) -> None:
    x, gain, bias = inputs(6, 96)
    block = Norm(width=96, eps=spec.eps, form=spec.form, bias=spec.bias, offset=spec.offset)
    block.load_state_dict({"weight": gain} | ({"bias": bias} if spec.bias else {}), assign=True)
    with torch.no_grad():
        due = block(x)
    found = norm(spec, available()[0], x, gain, bias if spec.bias else None, 1)
    torch.testing.assert_close(found, due, rtol=2e-6, atol=2e-6)


def test_a_row_does_not_depend_on_the_others() -> None:
    for spec, isa in itertools.product(SPECS[::2], available()):
        x, gain, bias = inputs(5, 100)
        alone = torch.cat([norm(spec, isa, row[None], gain, bias, 1) for row in x])
        x[1, 3], x[3] = float("nan"), float("inf")
        together = norm(spec, isa, x, gain, bias, 2)
        assert torch.equal(alone[[0, 2, 4]], together[[0, 2, 4]])
        assert bool(together[1].isnan().all())


def test_a_row_may_be_normalized_where_it_lies() -> None:
    for spec in SPECS:
        x, gain, bias = inputs(4, 70)
        due = norm(spec, available()[0], x, gain, bias, 1)
        launch(emit(spec), spec.op, available()[0], 2, x, gain, bias, x, 4, 70)
        assert torch.equal(x, due)


def test_constant_and_zero_rows_are_finite() -> None:
    x = torch.zeros(2, 48)
    x[1] = 5.0
    gain, bias = torch.ones(48), torch.zeros(48)
    for isa in available():
        assert torch.equal(norm(SPECS[0], isa, x[:1], gain, None, 1), torch.zeros(1, 48))
        assert torch.equal(norm(SPECS[2], isa, x, gain, bias, 1), torch.zeros(2, 48))
