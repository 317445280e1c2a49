"""binary_planes in C: the definition on every set, the same bits by any members."""

from __future__ import annotations

import pytest
import torch

from effc.compiler.planes import dense
from effc.kernels.binary_planes.call import binary_planes
from effc.kernels.binary_planes.cpu import cases
from effc.kernels.binary_planes.layout import pack, unpack
from effc.kernels.binary_planes.reference import example, reference
from effc.kernels.binary_planes.spec import BinaryPlanesSpec, refuses
from effc.kernels.cpu.isa import available

SPECS = [
    BinaryPlanesSpec(planes=3, epilogue=("bias", "silu", "residual")),
    BinaryPlanesSpec(planes=2, share=320, terms=2),
    BinaryPlanesSpec(planes=1, scale="float16"),
    BinaryPlanesSpec(planes=2, side="rows", share=32, scale="float16", epilogue=("mul",)),
    BinaryPlanesSpec(planes=4, side="rows", terms=3),
]


def name(spec: BinaryPlanesSpec) -> str:
    return f"{spec.planes}-{spec.side}-{spec.share}-{spec.scale}"


@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_equals_the_reference_on_every_set_and_number_of_threads(spec: BinaryPlanesSpec) -> None:
    for case in cases(spec):
        given = dict(case.given)
        x, words, scales = (given[key] for key in ("x", "words", "scales"))
        assert isinstance(x, torch.Tensor)
        assert isinstance(words, torch.Tensor)
        assert isinstance(scales, torch.Tensor)
        more = {key: value for key, value in given.items() if isinstance(value, torch.Tensor)}
        due = case.due["y"]
        for isa in available():
            one, two = (binary_planes(spec, isa, x, words, scales, due.shape[1], more, n) for n in (1, 2))
            assert float((one - due).abs().max()) <= case.tolerance * float(due.abs().max()), isa
            assert torch.equal(one, two), isa


@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_unpacking_undoes_packing(spec: BinaryPlanesSpec) -> None:
    n, k = (2 * spec.share, 45) if spec.side == "columns" and spec.share else (70, 2 * spec.share or 45)
    _, signs, scales = example(spec, 1, n, k, seed=3)
    back = unpack(spec, *pack(spec, signs, scales), n, k)
    assert torch.equal(back[0], signs)
    assert torch.equal(back[1], scales)


def test_a_power_of_two_is_a_shift_of_the_exponent() -> None:
    """Whole numbers times powers of two: every sum is exact, so the kernel is, to the bit."""
    spec = BinaryPlanesSpec(planes=2)
    _, signs, scales = example(spec, 1, 70, 77, seed=5)
    x = torch.randint(-8, 9, (2, 77), generator=torch.Generator().manual_seed(1)).float()
    exact = x @ dense(signs, scales, 77).T
    for isa in available():
        assert torch.equal(binary_planes(spec, isa, x, *pack(spec, signs, scales), 70, {}, 1), exact)


def test_what_cannot_be_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="multiple of 64"):
        BinaryPlanesSpec(planes=2, share=32)
    with pytest.raises(ValueError, match="multiple of 32"):
        BinaryPlanesSpec(planes=2, side="rows", share=16)
    with pytest.raises(ValueError, match="is one number"):
        BinaryPlanesSpec(planes=2, scale="float16", terms=2)
    assert "do not divide 100" in str(refuses(BinaryPlanesSpec(planes=2, share=64), 100, 64))
    assert refuses(BinaryPlanesSpec(planes=2), 100, 61) is None
    spec = BinaryPlanesSpec(planes=3, side="rows", share=32)
    x, signs, scales = example(spec, 1, 64, 64, seed=0)
    words, laid = pack(spec, signs, scales)
    assert words.nbytes + laid.nbytes == spec.bytes(64, 64)
    assert reference(spec, x, signs, scales, {}).shape == (1, 64)
