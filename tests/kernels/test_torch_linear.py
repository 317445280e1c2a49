"""Without a C compiler: torch's packed ops give the packed weights' results, and generation goes on."""

from __future__ import annotations

import pytest
import torch

from effc.compiler.blocks.quant_linear import QuantLinear
from effc.kernels.torch_linear import linear, pack
from effc.passes.lower.by_torch import by_torch
from effc.runtime import decoder as decoders
from effc.runtime.generate import generate
from tests.passes.test_lower import padded, quantized

CASES = [
    (4, 64, True, "int4"),
    (4, 32, False, "int4"),
    (8, 256, True, "int8"),
    (3, 64, False, "dense"),
    (8, 32, True, "dense"),
]


@pytest.mark.parametrize(("bits", "group", "symmetric", "form"), CASES)
def test_equals_the_unpacked_weights(bits: int, group: int, symmetric: bool, form: str) -> None:
    dice = torch.Generator().manual_seed(bits)
    half = 2 ** (bits - 1)
    unit = QuantLinear(in_features=256, out_features=48, bits=bits, group=group, symmetric=symmetric)
    q = torch.randint(-half, half, (48, 256), generator=dice, dtype=torch.int8)
    zeros = (
        None
        if symmetric
        else torch.randint(-half, half, (48, 256 // group), generator=dice, dtype=torch.int8)
    )
    unit.fill(q, torch.rand(48, 256 // group, generator=dice) * 0.02 + 0.01, zeros)
    packed = pack(bits, *unit.unpack(), torch.float32)
    assert packed.form == form
    x = torch.randn(2, 5, 256, generator=dice)
    due = x.double() @ unit.dense().double().t()
    error = float((linear(x, packed) - due).norm() / due.norm())
    assert error < (1e-6 if form == "dense" else 6e-3)  # bfloat16 has 8 bits of fraction


def test_a_machine_without_a_compiler_generates_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized(8)
    ids, mask = padded()
    monkeypatch.setattr(decoders, "compiler", lambda: None)
    made = decoders.decoder(model, 3, 20)
    assert isinstance(made, decoders.TorchDecoder)
    assert not any(isinstance(unit, QuantLinear) for _, unit in made.model.units())
    assert any(isinstance(unit, QuantLinear) for _, unit in model.units())  # the model itself is as it was
    with torch.inference_mode():
        due = decoders.TorchDecoder(model, 20).prefill(ids, mask)
        found = made.prefill(ids, mask)
    assert float((found - due).norm() / due.norm()) < 0.02
    assert generate(model, ids, mask, max_new_tokens=4).shape == (3, 13)
    assert by_torch(model) is not model
