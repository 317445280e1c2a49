"""Rewrites that stream: the same bytes as in memory, ties kept, and little memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from effc.compiler.blocks import LoraLinear
from effc.compiler.method import Context
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Rewrite
from effc.compiler.weights import resident
from effc.passes.adapt.fold import Fold
from effc.passes.prune.magnitude import Magnitude
from effc.passes.quantize.rtn import RTN
from effc.passes.reparam.dense import Dense
from effc.passes.reparam.hashed import Hashed
from effc.passes.tie.recursive import Recursive
from effc.runtime.rewriting import rewrite
from effc.specs.select import Rule
from tests.runtime.counted import Counted
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
    "shared": Recursive(loops=2, share="sequence", init="lower", tie_norms=True),
    "shared with differences": Recursive(loops=2, lora_rank=3),
}


def adapted() -> Model:
    """A model with adapters that change something, also beside a tied head."""
    model = tiny()
    rw = Rewriter(model)
    for path in ("layers.0.attention.q", "layers.1.mlp.down", "head"):
        unit = LoraLinear.over(rw.module(path), 2, 4.0, "rank")
        dice = torch.Generator().manual_seed(len(path))
        for name in ("a", "b"):
            shape = getattr(unit, name).shape
            setattr(unit, name, nn.Parameter(torch.randn(shape, generator=dice), requires_grad=False))
        rw.swap(path, unit)
    return rw.done()


def hashed() -> Model:
    """A model whose matrices share one array: its owner changes with every matrix that is written out."""
    return rewrite(Hashed(keep=0.1, init="project"), tiny(), Context()).model


MODELS = {
    **{name: (method, tiny) for name, method in METHODS.items()},
    "folded": (Fold(), adapted),
    "written out": (Dense(), hashed),
}


@pytest.mark.parametrize(("method", "model"), MODELS.values(), ids=MODELS)
def test_reads_one_weight_at_a_time(method: Rewrite, model: Callable[[], Model], tmp_path: Path) -> None:
    books = Counted()
    lazy = books.on_disk(model())
    rewrite(method, lazy, Context(workdir=tmp_path))
    largest = max(weight.nbytes for weight in lazy.weights.values())
    assert 0 < books.most < 2 * largest
    assert books.now == 0


@pytest.mark.parametrize(("method", "given"), MODELS.values(), ids=MODELS)
def test_the_same_bytes_as_in_memory(method: Rewrite, given: Callable[[], Model], tmp_path: Path) -> None:
    model = given()
    whole = rewrite(method, model, Context())
    streamed = rewrite(method, on_disk(model), Context(workdir=tmp_path))
    assert all(tensor.is_meta for tensor in streamed.model.tensors().values())
    assert streamed.model.ties() == whole.model.ties()
    assert [str(edit) for edit in streamed.log] == [str(edit) for edit in whole.log]
    assert streamed.measures == whole.measures
    got, due = streamed.model.materialize().tensors(), whole.model.tensors()
    assert got.keys() == due.keys()
    assert all(torch.equal(got[n], due[n]) for n in due)
