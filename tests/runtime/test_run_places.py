"""What goes wrong while a stage runs points at the call, or at the argument that it is about."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from effc.specs.diagnostic import Diagnostic, EffcError
from tests.trust.hostile import sound

from .workplace import RECIPE, Workplace


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    monkeypatch.chdir(tmp_path)
    return Workplace(tmp_path)


def refused(work: Workplace, text: str) -> tuple[Diagnostic, str]:
    """The one problem of a run, and the text that it points at."""
    with pytest.raises(EffcError) as caught:
        work.run(text)
    (problem,) = caught.value.diagnostics
    (label,) = problem.labels
    return problem, label.span.text


def test_a_weight_that_is_not_finite_points_at_the_stage_that_met_it(work: Workplace) -> None:
    (file,) = sound(work.folder / "model").glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if "layers.0" in name and "up_proj" in name)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    call = "quantize.rtn(base, bits = 4, group = 8)"
    text = f'effc 1\nrecipe t "Broken"\n\nmodel base = load("model")\n\nsmall = {call}\n'
    problem, place = refused(work, text)
    assert problem.code == "E420"
    assert "layers.0.mlp.up" in problem.title
    assert place == call


def test_a_problem_with_an_argument_points_at_it(work: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effc.passes.quantize._pieces.factor", lambda h, damp, order: None)
    problem, place = refused(work, RECIPE.replace("samples = 8", "samples = 8, damp = 2%"))
    assert problem.code == "E422"
    assert place == "damp = 2%"
    _, place = refused(work, RECIPE)
    assert place == "quantize.gptq", "the argument has its default, which is written nowhere"
