"""Models on disk compute, are measured and judged block by block: the same numbers, few weights in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from effc.compiler.facts import facts_of
from effc.compiler.method import Context
from effc.compiler.model import Model
from effc.compiler.presence import computed, computed_each, loaded
from effc.compiler.probe import broken, probe
from effc.compiler.shapes import Rewrite
from effc.compiler.sharing import owned
from effc.compiler.weights import resident
from effc.passes.prune.magnitude import Magnitude
from effc.passes.quantize.rtn import RTN
from effc.passes.reparam.hashed import Hashed
from effc.runtime import evaluate
from effc.runtime.data.choices import Question
from effc.runtime.evaluate import likelihoods, loss
from effc.runtime.rewriting import rewrite
from tests.passes.tiny_models import Sequences, blank, filled
from tests.runtime.counted import Counted

METHODS: dict[str, Rewrite] = {"rounded": RTN(bits=4, group=16), "pruned": Magnitude(pattern="2:4")}


@pytest.fixture(scope="module")
def model() -> Model:
    return filled(blank(layers=6))


def largest_blocks(model: Model) -> int:
    """Bytes of the two largest blocks."""
    blocks = [n.target for n in model.gm.graph.nodes if n.op == "call_module"]
    sizes = sorted(sum(t.numel() * 4 for t in model.module(str(b)).parameters()) for b in blocks)
    return sum(sizes[-2:])


def test_each_input_gets_its_own_answer(model: Model) -> None:
    books = Counted()
    lazy = books.on_disk(model)
    ids = [torch.randint(0, 48, (2, 5 + i), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    found = list(computed_each(lazy, [(some, lazy.step(some)) for some in ids]))
    assert all(torch.equal(logits, model(some)) for some, logits in zip(ids, found, strict=True))
    assert 0 < books.most <= largest_blocks(model)
    assert books.now == 0


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_tensor_that_a_block_holds_twice_is_in_both_places(dtype: torch.dtype | None) -> None:
    """All matrices read one array: each has it in memory, not only the first of its block."""
    shared = rewrite(Hashed(keep=0.25), filled(blank(layers=2)), Context()).model
    lazy, ids = _on_disk(shared), torch.arange(12).view(2, 6)
    want = shared.clone().to(dtype)(ids) if dtype else shared(ids)
    assert torch.equal(computed(lazy, ids, dtype), want)
    block: Any = loaded(lazy, "layers.1.attention")
    assert not any(tensor.is_meta for _, tensor in owned(block, once=False))
    assert block.q.pool is block.o.pool
    assert block.q.scales is block.k.scales


def test_losses_of_a_model_on_disk(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "TOKENS", 16)
    monkeypatch.setattr(evaluate, "TOGETHER", 3)
    books, data = Counted(), Sequences(model, count=15, length=8)
    assert loss(books.on_disk(model), data, "train") == loss(model, data, "train")
    assert 0 < books.most <= largest_blocks(model)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_contract_is_measured_on_disk(method: Rewrite, model: Model) -> None:
    after = rewrite(method, model, Context()).model
    books = Counted()
    streamed = probe(method, books.on_disk(model), _on_disk(after))
    assert streamed == probe(method, model, after)
    assert streamed.held
    assert 0 < books.most <= largest_blocks(model)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_facts_are_those_of_the_weights(method: Rewrite, model: Model) -> None:
    after = rewrite(method, model, Context()).model
    assert facts_of(_on_disk(after)) == facts_of(after)
    assert not broken(method, model, _on_disk(after), method.contract)
    assert broken(method, model, _on_disk(model), method.contract)


def test_choices_of_a_model_on_disk(model: Model) -> None:
    choices = tuple(np.array(ids, np.int64) for ids in ([3, 4], [5], [6, 7, 8]))
    question = Question(np.array([1, 2], np.int64), choices, (2, 1, 3), 0)  # type: ignore[arg-type]
    assert torch.equal(likelihoods(_on_disk(model), question), likelihoods(model, question))


def _on_disk(model: Model) -> Model:
    lazy = model.clone()
    lazy.weights = {name: resident(tensor) for name, tensor in model.tensors().items()}
    lazy.release()
    return lazy
