"""A llama whose every feed-forward block became a mixture is written as a mixtral, for transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from effc.compiler.emitted import emitted
from effc.compiler.exporter import inexpressible
from effc.compiler.importer import import_folder
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.passes.moe.upcycle import Upcycle

from .test_exporter import IDS, close, made, theirs, written


def upcycled(model: Model, **changes: object) -> Model:
    rw = Rewriter(model)
    torch.manual_seed(3)
    Upcycle.model_validate({"experts": 4, "every": 1} | changes).rewrite(rw)
    return rw.done()


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_transformers_runs_an_upcycled_model_as_a_mixtral(name: str, tmp_path: Path) -> None:
    mixture = upcycled(made(name, rms_norm_eps=1e-3), noise=0.5, top_k=3)
    assert inexpressible(mixture) == []
    folder = written(mixture, tmp_path / "out")
    config = emitted(mixture)
    assert (config["model_type"], config["architectures"]) == ("mixtral", ["MixtralForCausalLM"])
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (4, 3)
    again = import_folder(folder).materialize()
    assert again.architecture == "mixtral"
    with torch.no_grad():
        want = mixture(IDS)
        assert close(again(IDS), want)
        assert close(theirs(folder), want)


def test_settings_of_training_alone_do_not_keep_a_model_from_its_layout() -> None:
    assert inexpressible(upcycled(made("llama"), balance=0.5, capacity=1.5)) == []


def test_what_a_mixtral_cannot_be_is_refused_by_name() -> None:
    some = " ".join(inexpressible(upcycled(made("llama"), every=2)))
    assert "has `layers.0.mlp`" in some
    assert "lacks `layers.0.moe`" in some
    shrunken = " ".join(inexpressible(upcycled(made("llama"), renorm=False)))
    assert "`layers.0.moe` has renormalize False where the config gives True" in shrunken
    biased = made("llama", attention_bias=True)
    assert "`attention_bias`" in " ".join(inexpressible(upcycled(biased)))


def test_a_family_without_such_a_kin_is_refused_by_name() -> None:
    why = " ".join(inexpressible(upcycled(made("qwen3"))))
    assert "`layers.0.moe`" in why


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_upcycling_changes_no_output(name: str) -> None:
    model = made(name)
    with torch.no_grad():
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
            wide = model.clone().to(dtype)
            want = wide(IDS)
            assert float((upcycled(wide)(IDS) - want).abs().max() / want.abs().max()) < tolerance
