"""Adapters start as nothing, train alone, fold exactly, and refuse what they cannot sit on."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from effc.compiler.assemble import assemble
from effc.compiler.blocks import MLP, Attention, Embedding, Linear, LoraLinear, Norm, QuantLinear
from effc.compiler.graph_json import from_json, to_json
from effc.compiler.method import Batch, Context
from effc.compiler.model import Model
from effc.compiler.op_graph import evaluate, expand
from effc.compiler.probe import probe
from effc.compiler.rewrite import Rewriter
from effc.compiler.sharing import tie
from effc.passes.adapt.fold import Fold
from effc.passes.adapt.lora import Lora
from effc.passes.quantize.rtn import RTN
from effc.runtime.fit import fit
from effc.runtime.parts.train.optimizer.adamw import AdamW
from effc.specs.diagnostic import EffcError
from effc.specs.recipe import Ref

DATA = Ref("text")
V, T = 31, 12


def made(seed: int = 0, dtype: str = "float32") -> Model:
    def layer() -> dict[str, torch.nn.Module]:
        attention = Attention(width=16, heads=2, kv_heads=1, head_dim=8, dtype=dtype)
        norms = [Norm(width=16, dtype=dtype) for _ in range(2)]
        return {
            "norm1": norms[0],
            "attention": attention,
            "norm2": norms[1],
            "mlp": MLP(width=16, hidden=24, dtype=dtype),
        }

    head = Linear(in_features=16, out_features=V, dtype=dtype)
    gm = assemble(
        Embedding(vocab=V, width=16, dtype=dtype), [layer(), layer()], Norm(width=16, dtype=dtype), head
    )
    tie(gm, "head.weight", "embedding.weight")
    model = Model(gm, architecture="llama", config={"hidden_size": 16})
    dice = torch.Generator().manual_seed(seed)
    for name, tensor in model.tensors().items():
        value = torch.randn(tensor.shape, generator=dice) / 4 + ("norm" in name)
        model.place(name, torch.nn.Parameter(value.to(tensor.dtype), requires_grad=False))
    return model


def adapted(method: Lora, model: Model, seed: int = 0) -> Model:
    rw = Rewriter(model)
    method.outline(rw, ())
    method.begin(rw, seed)
    return rw.done()


def stirred(model: Model) -> Model:
    """The same adapters with B no longer zero."""
    model = model.clone()
    dice = torch.Generator().manual_seed(5)
    for name, tensor in model.tensors().items():
        if name.endswith(".b"):
            model.place(name, (torch.randn(tensor.shape, generator=dice) / 8).to(tensor.dtype))
    return model


def folded(model: Model) -> Model:
    rw = Rewriter(model)
    Fold().rewrite(rw)
    return rw.done()


class Repeating:
    """Sequences that count up by a fixed stride: something to learn in a few steps."""

    fingerprint = vocabulary = "counting"
    bytes_per_token = 1.0

    def size(self, split: str) -> int:
        return 16

    def tokens(self, split: str) -> int:
        return 16 * (T - 1)

    def batch(self, split: str, indices: Sequence[int]) -> Batch:
        ids = torch.stack([(torch.arange(T) * 3 + i) % V for i in indices])
        labels = torch.cat([ids[:, 1:], torch.full((len(ids), 1), -100)], 1)
        return Batch(ids, labels, made().step(ids))


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, V, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_starts_as_the_model_itself(dtype: str, ids: torch.Tensor) -> None:
    model = made(dtype=dtype)
    out = adapted(Lora(data=DATA, steps=1, rank=4), model)
    assert torch.equal(out(ids), model(ids))
    assert sum(isinstance(unit, LoraLinear) for _, unit in out.units()) == 14
    assert out.roles["layers.1.mlp.up"].name == "mlp.up"
    assert isinstance(model.module("layers.1.mlp.up"), Linear)


def test_it_adds_rank_times_both_sides() -> None:
    model = made()
    out = adapted(Lora(data=DATA, steps=1, rank=3, select=("attention.q", "mlp.down")), model)
    more = sum(t.numel() for t in out.tensors().values()) - sum(t.numel() for t in model.tensors().values())
    assert more == 2 * 3 * ((16 + 16) + (24 + 16))


def test_only_the_adapter_trains_and_it_learns(ids: torch.Tensor) -> None:
    model = made()
    quick = AdamW(lr=0.02)
    method = Lora(data=DATA, steps=30, batch=4, rank=4, dropout=0.1, precision="fp32", optimizer=quick)
    outcome = fit(method, model, Context(data={"data": Repeating()}))
    curve = outcome.measures["curve"]
    after = outcome.model.tensors()
    for name, tensor in model.tensors().items():
        path, _, slot = name.rpartition(".")
        held = name if name in after else f"{path}.base.{slot}"
        assert torch.equal(after[held], tensor), name
    batch = Repeating().batch("train", range(4))
    losses = [method.loss(m.clone(), {}, batch)["total"].item() for m in (model, outcome.model)]
    assert losses[1] < losses[0] - 0.2, curve


def test_folding_is_exact(ids: torch.Tensor) -> None:
    apart = stirred(adapted(Lora(data=DATA, steps=1, rank=4, scaling="sqrt_rank"), made()).to(torch.float64))
    whole = folded(apart)
    assert not any(isinstance(unit, LoraLinear) for _, unit in whole.units())
    assert whole.tensors().keys() == made().tensors().keys()
    want = apart(ids)
    assert (whole(ids) - want).abs().max() <= 1e-12 * want.abs().max()
    assert (want - made().to(torch.float64)(ids)).abs().max() > 1e-3


def test_packed_weights_can_be_adapted_but_not_folded(ids: torch.Tensor) -> None:
    rw = Rewriter(made())
    RTN(bits=4, group=8).rewrite(rw)
    packed = rw.done()
    apart = adapted(Lora(data=DATA, steps=1), packed)
    assert isinstance(apart.module("layers.0.mlp.up").base, QuantLinear)
    assert torch.equal(apart(ids), packed(ids))
    (problem,) = Fold().refuses(apart, ())
    assert problem.code == "E463"
    assert "fold before quantizing" in str(problem.help)


def test_structure_survives_json(ids: torch.Tensor) -> None:
    rw = Rewriter(made())
    RTN(bits=4, group=8, select=("mlp.*",)).rewrite(rw)
    model = stirred(adapted(Lora(data=DATA, steps=1, rank=2), rw.done()))
    again = from_json(to_json(model))
    assert again.tensors().keys() == model.tensors().keys()
    for name, tensor in model.tensors().items():
        again.place(name, tensor)
    assert torch.equal(again(ids), model(ids))


def test_rules_give_modules_another_rank() -> None:
    method = Lora(
        data=DATA, steps=1, rank=2, rules=({"on": "mlp.*", "rank": 5}, {"on": "attention.k", "skip": True})
    )
    model = adapted(method, made())
    assert model.module("layers.0.mlp.gate").rank == 5
    assert model.module("layers.0.attention.q").rank == 2
    assert isinstance(model.module("layers.0.attention.k"), Linear)


def test_seeds_differ_and_repeat() -> None:
    method = Lora(data=DATA, steps=1)
    first, again, other = (adapted(method, made(), seed).tensors()["layers.0.mlp.up.a"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.abs().max() <= 16**-0.5


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"rank": 20}, "E340", "at most 8, not 20"),
        ({"select": ("head",)}, "E320", "shares its weight"),
        ({"select": ("embedding",)}, "E320", "not a linear"),
    ],
)
def test_what_it_cannot_sit_on_is_named(fields: dict[str, object], code: str, words: str) -> None:
    problems = Lora(data=DATA, steps=1, **fields).refuses(made(), ())
    assert problems[0].code == code
    assert any(words in note for problem in problems for note in problem.notes)


def test_adapting_twice_and_folding_nothing_are_refused() -> None:
    method = Lora(data=DATA, steps=1)
    assert [p.code for p in method.refuses(adapted(method, made()), ())] == ["E320"]
    assert [p.code for p in Fold().refuses(made(), ())] == ["E464"]


def test_a_selector_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(EffcError):
        Lora(data=DATA, steps=1, select=("mlp.upp",)).refuses(made(), ())


def test_its_ops_equal_its_forward() -> None:
    block = stirred(adapted(Lora(data=DATA, steps=1, rank=3), made())).module("layers.0.mlp")
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))
    step = made().step(torch.zeros(2, 5, dtype=torch.int64))
    assert torch.equal(evaluate(expand(block), block, x, step)[0], block(x))


def test_folding_into_half_precision_keeps_the_contract_and_a_wrong_fold_does_not() -> None:
    model = stirred(adapted(Lora(data=DATA, steps=1), made(dtype="bfloat16")))
    kept = probe(Fold(), model, folded(model))
    assert kept.error > 1e-4, "bfloat16 rounds the sum; that alone may not break the promise"
    assert kept.held
    assert kept.error_float32 is not None
    assert kept.error_float32 < 1e-4

    class Half(Fold):
        def rewrite(self, rw: Rewriter) -> None:
            super().rewrite(rw)
            path = "layers.0.attention.q"
            rw.write(path, "weight", rw.module(path).weight * 1.01)

    assert not probe(Half(), model, folded(model)).held
