"""Adapters behind gates: what a gate is trained in, and how a token finds its adapters."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from effc.compiler import graph_json
from effc.compiler.blocks import GatedLora, RoutedLora
from effc.compiler.cost import count
from effc.compiler.method import Context
from effc.compiler.model import Model
from effc.compiler.op_graph import evaluate, expand
from effc.compiler.rewrite import Rewriter
from effc.passes.adapt.fold import Fold
from effc.passes.adapt.lora import Lora
from effc.passes.moe.phatgoose import Phatgoose
from effc.passes.moe.phatgoose_gate import PhatgooseGate
from effc.passes.quantize.rtn import RTN
from effc.runtime.fit import fit
from effc.runtime.stage import run_stage
from effc.specs.diagnostic import EffcError
from effc.specs.recipe import Ref

from .tiny_models import WIDTH, Sequences, blank, filled, on_meta, outputs

IDS = torch.arange(36).view(3, 12)
FORMS: dict[str, Any] = {"data": Ref("code"), "batch": 4, "precision": "fp32"}
X = torch.randn(3, 12, WIDTH, generator=torch.Generator().manual_seed(0))
Q = "layers.1.attention.q"


@cache
def adapted(seed: int, rank: int = 4, base: int = 0) -> Model:
    model = filled(blank(layers=2), base)
    method = Lora(steps=3, rank=rank, select=("attention",), **FORMS)
    return fit(method, model, Context(seed, {"data": Sequences(model, seed=seed)})).model


@cache
def gated(seed: int, rank: int = 4, base: int = 0) -> Model:
    model = adapted(seed, rank, base)
    return fit(
        PhatgooseGate(**FORMS | {"steps": 2}), model, Context(seed, {"data": Sequences(model, seed=seed)})
    ).model


def joined(*models: Model, k: int = 2) -> Model:
    return run_stage(Phatgoose(k=k), models, Context()).model


def test_a_gate_starts_at_half_and_trains_alone() -> None:
    start = Rewriter(adapted(1))
    method = PhatgooseGate(**FORMS | {"steps": 2})
    method.outline(start, [])
    method.begin(start, 0)
    unit = start.module(Q)
    assert isinstance(unit, GatedLora)
    change = adapted(1).module(Q)
    torch.testing.assert_close(unit(X), (change.base(X) + change(X)) / 2)
    after, before = gated(1).tensors(), start.model.tensors()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {name for name in after if name.endswith(".gate")}
    torch.testing.assert_close(evaluate(expand(unit), unit, X, gated(1).step(IDS))[0], unit(X))
    assert count(gated(1)).params - count(adapted(1)).params == 2 * 4 * WIDTH


def test_scores_follow_the_formula_and_weights_sum_to_one() -> None:
    unit = joined(gated(1), gated(2), gated(3)).module(Q)
    assert isinstance(unit, RoutedLora)
    flat = X.view(-1, WIDTH)

    def plain(t: torch.Tensor) -> torch.Tensor:
        return (t - t.mean(-1, keepdim=True)) / (t.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    gates = torch.cat([plain(gated(n).module(Q).gate) for n in (1, 2, 3)])
    scores = plain(flat) @ gates.t() / WIDTH**0.5
    weights, chosen = unit.route(flat)
    top = scores.topk(2, -1)
    torch.testing.assert_close(chosen, top.indices)
    torch.testing.assert_close(weights, top.values.softmax(-1), rtol=1e-4, atol=1e-5)
    want = unit.base(flat)
    for n in range(3):
        change = adapted(n + 1).module(Q)
        share = (weights * (chosen == n)).sum(1, keepdim=True)
        want = want + share * (flat @ change.change().t())
    torch.testing.assert_close(unit(flat), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(evaluate(expand(unit), unit, X, gated(1).step(IDS))[0], unit(X))


def test_one_model_a_token_has_weight_one() -> None:
    unit = joined(gated(1), gated(2), k=1).module(Q)
    flat = X.view(-1, WIDTH)
    _, chosen = unit.route(flat)
    for row in range(6):
        change = adapted(int(chosen[row]) + 1).module(Q)
        torch.testing.assert_close(unit(flat[row]), change(flat[row]), rtol=1e-4, atol=1e-5)


def test_a_further_model_changes_no_number_of_the_others_and_ranks_may_differ() -> None:
    two, three = joined(gated(1), gated(2)), joined(gated(1), gated(2), gated(3, rank=7))
    small, large = two.module(Q), three.module(Q)
    assert large.a.shape == (3, 7, WIDTH)
    assert torch.equal(large.a[:2, :4], small.a)
    assert torch.equal(large.b[:2, :, :4], small.b)
    assert torch.equal(large.gates[:2], small.gates)
    sides = 2 * (3 * (2 * WIDTH) + (WIDTH + 16) * 2 - 2 * WIDTH)
    assert sides > 0
    one = WIDTH + 7 * 2 * WIDTH
    assert count(three).params > count(two).params + one
    back = graph_json.from_json(graph_json.to_json(three))
    for name, tensor in three.tensors().items():
        back.place(name, tensor.detach())
    assert torch.equal(outputs(back, IDS), outputs(three, IDS))


def test_rows_are_routed_alone() -> None:
    model = joined(gated(1), gated(2), k=1)
    whole = outputs(model, IDS)
    for row in range(3):
        torch.testing.assert_close(
            outputs(model, IDS[row : row + 1]), whole[row : row + 1], rtol=1e-4, atol=1e-5
        )


def test_it_refuses_in_the_words_of_its_card() -> None:
    one, two = gated(1), gated(2)
    assert Phatgoose(k=3).refuses(one, [two])[0].help == "use k = 2 or less"
    (bare,) = Phatgoose().refuses(one, [adapted(2)])
    assert bare.title == "`moe.phatgoose` finds no gate in its model number 2"
    assert PhatgooseGate(**FORMS).refuses(filled(blank(layers=2)), [])[0].code == "E464"
    other = Rewriter(two)
    other.swap(Q, two.module(Q).base)
    (odd,) = Phatgoose().refuses(one, [other.done()])
    assert odd.notes == (f"{Q} in one of models 1 and 2 alone",)
    untrained = Rewriter(adapted(2))
    method = PhatgooseGate(**FORMS)
    method.outline(untrained, [])
    method.begin(untrained, 0)
    with pytest.raises(EffcError, match=r"number 2 at layers\.0\.attention\.q was never trained"):
        joined(one, untrained.done())
    with pytest.raises(EffcError, match="differ beneath their adapters"):
        joined(one, gated(2, base=5))
    rw = Rewriter(on_meta(one))
    Phatgoose().outline(rw, [on_meta(two)])
    assert count(rw.done(), 8) == count(joined(one, two), 8)


def test_what_tokens_choose_is_neither_folded_nor_rounded() -> None:
    both = joined(gated(1), gated(2))
    rw = Rewriter(both)
    Fold().rewrite(rw)
    assert not [edit for edit in rw.log if "folded" in edit.detail]
    assert RTN(bits=8, select=("attention",)).refuses(both)[0].code == "E323"
