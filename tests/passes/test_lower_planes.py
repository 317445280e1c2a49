"""Lowering of planes of signs: a C program looks them up, and gives the logits that torch gives."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from effc.compiler.method import Context
from effc.compiler.model import Model
from effc.kernels.cpu.isa import available
from effc.passes.lower.decoder import lower
from effc.passes.reparam.shift_add import ShiftAdd
from effc.runtime.decoder import ProgramDecoder, TorchDecoder, ready
from effc.runtime.kernel_table import kernels_of
from effc.runtime.stage import run_stage
from tests.compiler.conftest import FAMILIES, V, fill

from .test_lower import BATCH, LENGTH, padded

Layout = Literal["column", "row", "block8"]


def of_signs(layout: Layout, bits: int, **more: object) -> Model:
    """A llama whose linear weights are planes of signs."""
    fields = {"metric": "weight", "layout": layout, "bits": bits, "rounds": 2} | more
    model = fill(FAMILIES["llama"]())
    return run_stage(ShiftAdd.model_validate(fields), [model], Context()).model


@pytest.mark.parametrize(
    ("layout", "bits", "more"),
    [
        ("column", 3, {}),
        ("column", 1, {"scale": "apot2", "terms": 2}),
        ("row", 2, {"scale": "fp16"}),
        ("block8", 2, {}),  # runs of 4 rows, which blocks of 64 do not divide
    ],
)
def test_a_program_of_signs_gives_the_logits_of_its_model(layout: Layout, bits: int, more: Any) -> None:
    """Prompts of unequal lengths, then tokens; by one member and by two, to the bit."""
    model = of_signs(layout, bits, **more)
    ids, mask = padded()
    with torch.inference_mode():
        due = TorchDecoder(model, LENGTH + 3)
        engines = [ProgramDecoder(ready(model, threads=n), BATCH, LENGTH + 3) for n in (1, 2)]
        rounds = [[each.prefill(ids, mask) for each in (due, *engines)]]
        for i in range(3):
            token = (ids[:, i] + 7) % V
            rounds.append([each.next(token) for each in (due, *engines)])
    for expected, one, two in rounds:
        assert float((one - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
        assert torch.equal(one, two)


def test_bits_do_not_depend_on_rows_on_any_set() -> None:
    model = of_signs("column", 3)
    ids, _ = padded()
    for isa in available():
        made = ready(model, isa, threads=2)
        whole = ProgramDecoder(made, BATCH, LENGTH).prefill(ids, None)
        tokens = ProgramDecoder(made, BATCH, LENGTH)
        last = tokens.prefill(ids[:, :1], None)
        for i in range(1, LENGTH):
            last = tokens.next(ids[:, i])
        assert torch.equal(whole, last), isa


def test_signs_are_kept_as_they_are_stored_and_named() -> None:
    """Every linear layer is looked up; what has no kernel is read as dense numbers, and it is said why."""
    model = of_signs("column", 2)
    ops = [call.op for call in lower(model).plan.calls if call.layer == 0]
    assert ops.count("binary_planes") == 7
    assert "dense_linear" not in ops
    held = ready(model, threads=1).program.tensors
    unit = model.module("layers.0.mlp.up")
    words, scales = (held[f"layers.0.mlp.up.signs:{part}"] for part in ("words", "scales"))
    assert words.nbytes == 2 * -(-unit.out_features // 64) * 64 * -(-unit.in_features // 32) * 4
    assert scales.nbytes == 2 * -(-unit.in_features // 32) * 32
    rows = kernels_of(of_signs("block8", 2))["rows"]
    why = {row["why"] for row in rows if row["kernel"].startswith("dense_linear") and row["where"]}
    assert any("rows share a scale; a multiple of 64" in words for words in why)
