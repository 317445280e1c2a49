"""Rewrites that stream: the same bytes as in memory, ties kept, and little memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from effc.compiler.method import Context
from effc.compiler.model import Model
from effc.compiler.shapes import Rewrite
from effc.compiler.weights import resident
from effc.passes.prune.magnitude import Magnitude
from effc.passes.quantize.rtn import RTN
from effc.runtime.rewriting import rewrite
from effc.specs.select import Rule
from tests.runtime.doubles import tiny


def on_disk(model: Model) -> Model:
    """The same model with every weight lazy."""
    lazy = model.clone()
    lazy.weights = {name: resident(tensor) for name, tensor in model.tensors().items()}
    lazy.release()
    return lazy


HEAD = Rule.model_validate({"on": "head", "bits": 8})
METHODS = {
    "rounded": RTN(bits=4, group=16),
    "rounded with its tied head": RTN(
        bits=4, group=16, rules=(Rule.model_validate({"on": "head", "bits": 8}),)
    ),  # type: ignore[call-arg]
    "pruned": Magnitude(sparsity=0.5),
    "pruned at once": Magnitude(sparsity=0.5, scope="global"),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_same_bytes_as_in_memory(method: Rewrite, tmp_path: Path) -> None:
    model = tiny()
    whole = rewrite(method, model, Context())
    streamed = rewrite(method, on_disk(model), Context(workdir=tmp_path))
    assert all(tensor.is_meta for tensor in streamed.model.tensors().values())
    assert streamed.model.ties() == whole.model.ties()
    assert [str(edit) for edit in streamed.log] == [str(edit) for edit in whole.log]
    assert streamed.measures == whole.measures
    got, due = streamed.model.materialize().tensors(), whole.model.tensors()
    assert got.keys() == due.keys()
    assert all(torch.equal(got[n], due[n]) for n in due)
