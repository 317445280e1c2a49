"""Linear layers in their cheapest equal form: decoders with adapters, factors and gains; traced networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effc.compiler.blocks import Linear
from effc.compiler.blocks.lora_linear import LoraLinear
from effc.compiler.blocks.low_rank_linear import LowRankLinear
from effc.compiler.cost import count
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.trace import trace
from effc.passes.adapt.lora import Lora
from effc.passes.quantize.rtn import RTN
from effc.passes.reparam.egraph import Egraph
from effc.passes.reparam.low_rank import LowRank
from effc.specs.recipe import Ref
from tests.claims import Measured
from tests.compiler.conftest import FAMILIES, fill, inputs

from .edited import edited, moved
from .tiny_models import on_meta


def problems(method: Egraph, model: Any) -> str:
    return "\n".join(d.render() for d in method.refuses(model))


def adapted(name: str, **more: Any) -> Model:
    """A model with adapters that are not zero."""
    rw = Rewriter(fill(FAMILIES[name]()))
    Lora(data=Ref("code"), steps=1, rank=2, **more).outline(rw, ())
    return fill(rw.done())


def types(model: Model) -> set[type]:
    return {type(model.module(path)) for path in model.paths()}


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "neox", "mixtral"])
def test_gains_go_into_weights(name: str) -> None:
    model = fill(FAMILIES[name]())
    method = Egraph()
    assert problems(method, model) == ""
    x = inputs(model, 3, 9)
    assert moved(method, model, x, torch.float64) < 1e-9
    assert moved(method, model, x, torch.float32) < 1e-5
    after = edited(method, model)
    norm: Any = after.module("layers.0.norm1")
    assert bool((norm.weight + norm.offset == 1).all())
    assert norm.bias is None or not norm.bias.any()
    rw = Rewriter(on_meta(model))
    method.outline(rw, ())
    assert count(rw.done()) == count(after)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_adapters_go_into_their_weights(name: str) -> None:
    model = adapted(name)
    assert LoraLinear in types(model)
    for method in (Egraph(), Egraph(rules=("lora_merge", "assoc"), cost="flops")):
        assert moved(method, model, inputs(model), torch.float64) < 1e-9
        after = edited(method, model)
        assert LoraLinear not in types(after)
        assert count(after).flops_per_token < count(model).flops_per_token
        assert count(after).params <= count(model).params + 3 * 32 + 61


def test_factors_are_multiplied_where_that_is_cheaper() -> None:
    model = fill(FAMILIES["qwen3"]())
    rw = Rewriter(model)
    for path, rank in (("layers.0.mlp.up", 4), ("layers.1.mlp.up", 31)):
        old: Any = rw.module(path)
        unit = LowRankLinear(in_features=old.in_features, out_features=old.out_features, rank=rank)
        rw.swap(path, unit)
    model = fill(rw.done())
    after = edited(Egraph(rules=("assoc",), cost="flops"), model)
    assert isinstance(after.module("layers.0.mlp.up"), LowRankLinear)
    assert isinstance(after.module("layers.1.mlp.up"), Linear)
    assert moved(Egraph(rules=("assoc",), cost="flops"), model, inputs(model), torch.float64) < 1e-9
    both = edited(Egraph(cost="flops"), model)
    assert isinstance(both.module("layers.0.mlp.up"), LowRankLinear)
    assert bool((both.module("layers.0.norm2").weight == 1).all()), "the gain went into the first factor"
    assert moved(Egraph(cost="flops"), model, inputs(model), torch.float64) < 1e-9


def test_packed_and_shared_weights_keep_their_norms() -> None:
    model = fill(FAMILIES["llama"]())
    after = edited(Egraph(), model)
    assert after.ties() == model.ties()
    assert torch.equal(after.module("norm").weight, model.module("norm").weight), "the head is shared"
    rw = Rewriter(fill(FAMILIES["llama"]()))
    RTN(bits=8, group=16).rewrite(rw)
    assert "finds nothing to simplify" in problems(Egraph(), rw.done())
    over = adapted("llama")
    rw = Rewriter(over)
    RTN(bits=8, group=16, select=("layers[*].attention.o",)).refuses(over)
    assert problems(Egraph(), over) == ""


def test_nothing_is_left_to_simplify_in_what_was_simplified() -> None:
    model = edited(Egraph(rules=("assoc", "lora_merge")), adapted("llama"))
    said = problems(Egraph(rules=("assoc", "lora_merge")), model)
    assert "E320" in said
    assert "by assoc, lora_merge no layer has a cheaper equal form in latency" in said


class Chain(nn.Module):
    """A (B (C x)) + D x, relu, then two heads of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.b = nn.Linear(8, 32), nn.Linear(32, 32, bias=False)
        self.a, self.d = nn.Linear(32, 8), nn.Linear(8, 8, bias=False)
        self.left, self.right = nn.Linear(8, 5), nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(self.a(self.b(self.c(x))) * 0.5 + self.d(x))
        return self.left(y), self.right(y)


def test_a_traced_network_is_rebuilt() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 7, 8)
    model = trace(Chain(), x)
    assert problems(Egraph(), model) == ""
    after = edited(Egraph(), model)
    assert len(model.paths("linear")) == 6
    assert len(after.paths("linear")) == 2
    with torch.no_grad():
        for one, two in zip(model(x), after(x), strict=True):
            assert torch.allclose(one, two, atol=1e-5)
    assert count(after).flops_per_token < count(model).flops_per_token
    apart = edited(Egraph(rules=("fold", "assoc", "lora_merge"), cost="flops"), model)
    assert len(apart.paths("linear")) == 3, "layers of one input stay two where only work counts"
    rw = Rewriter(on_meta(model))
    Egraph().outline(rw, ())
    assert count(rw.done()) == count(after)


def test_limits_end_the_search_and_the_result_is_right_all_the_same() -> None:
    model = trace(Chain(), torch.randn(4, 8))
    for method in (Egraph(iters=1), Egraph(nodes=100)):
        if problems(method, model):
            continue
        with torch.no_grad():
            x = torch.randn(4, 8)
            assert torch.allclose(edited(method, model)(x)[0], model(x)[0], atol=1e-5)


def test_two_runs_write_the_same_numbers() -> None:
    model = adapted("gpt2")
    first, again = edited(Egraph(), model).tensors(), edited(Egraph(), model).tensors()
    assert first.keys() == again.keys()
    assert all(torch.equal(t, again[name]) for name, t in first.items())


def test_fields_are_held_to_their_limits() -> None:
    for wrong in ({"iters": 0}, {"nodes": 10}, {"cost": "money"}, {"rules": ("luck",)}):
        with pytest.raises(ValueError, match="validation error"):
            Egraph.model_validate(wrong)


@pytest.mark.claim
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_cheapest_form_is_exact_and_cheaper(seed: int, measured: Measured) -> None:
    for name in ("llama", "gpt2", "gemma2"):
        rw = Rewriter(fill(FAMILIES[name](), seed))
        LowRank(rank=12, select=("mlp",)).outline(rw, ())
        Lora(data=Ref("code"), steps=1, rank=2, select=("attention",)).outline(rw, ())
        model = fill(rw.done(), seed)
        worst = moved(Egraph(), model, inputs(model, 3, 9, seed), torch.float64)
        measured(
            "reparam.egraph",
            f"a {name} with factors and adapters moves by no more in float64",
            worst,
            below=1e-9,
        )
        after = edited(Egraph(cost="flops"), model)
        ratio = count(after).flops_per_token / count(model).flops_per_token
        measured("reparam.egraph", f"work of that {name}, of what it was", ratio, below=1.0)
