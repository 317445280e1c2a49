"""Blocks in the place of others: what stays the function, what must be trained, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from effc.compiler.assemble import assemble
from effc.compiler.blocks import MLP, Attention, Embedding, Linear, MoE, Norm
from effc.compiler.blocks.gated_attention import GatedAttention
from effc.compiler.blocks.learned_scale import LearnedScale
from effc.compiler.cost import count
from effc.compiler.method import Context
from effc.compiler.model import Model
from effc.compiler.op_graph import evaluate, expand
from effc.compiler.probe import difference, probe, widened
from effc.compiler.sharing import tie
from effc.passes.adapt.lora import Lora
from effc.passes.arch.gated_attention import GatedAttentionSwap
from effc.passes.arch.layer_norm import LayerNormSwap
from effc.passes.arch.residual_scale import ResidualScale
from effc.passes.lower.decoder import lower
from effc.passes.quantize.rtn import RTN
from effc.passes.tie.recursive import Recursive
from effc.runtime.generate import generate
from effc.runtime.stage import run_stage
from effc.specs.recipe import Ref

from .tiny_models import Sequences, blank, filled, on_meta, outputs

IDS = torch.arange(36).view(3, 12)
FIRST: Any = {"from": "layernorm", "to": "rmsnorm"}


def swapped(method: Any, model: Model) -> Model:
    return run_stage(method, [model], Context(seed=1)).model


def plain(order: Any = "pre", experts: bool = False, tied: bool = True, norm: bool = True) -> Model:
    """A decoder with layer norms, biases, learned positions, and experts where wanted, of random weights."""

    def between() -> Norm:
        return Norm(width=32, form="layer", eps=1e-5, bias=True)

    def layer() -> dict[str, nn.Module]:
        attention = Attention(width=32, heads=4, kv_heads=4, head_dim=8, bias=True, bias_o=True)
        mixer: dict[str, nn.Module] = {"mlp": MLP(width=32, hidden=48, gated=False, bias=True)}
        if experts:
            mixer = {"moe": MoE(width=32, hidden=40, experts=4, active=2)}
        return {"norm1": between(), "attention": attention, "norm2": between()} | mixer

    head = Linear(in_features=32, out_features=48)
    embedding = Embedding(vocab=48, width=32, positions=40)
    gm = assemble(embedding, [layer(), layer()], between() if norm else None, head, order=order)
    if tied:
        tie(gm, "head.weight", "embedding.weight")
    return filled(Model(gm, config={"hidden_size": 32}))


# -- gated attention


@pytest.mark.parametrize("more", [{}, {"kind": "element"}, {"kind": "element", "position": "after_o"}])
def test_neutral_gates_leave_the_function(more: dict[str, Any]) -> None:
    method = GatedAttentionSwap.model_validate(more)
    for model in (filled(blank()), plain()):
        gated = swapped(method, model)
        assert difference(outputs(model, IDS), outputs(gated, IDS)) < 1e-6
        found = probe(method, model, gated)
        assert (found.fidelity, found.held) == ("EXACT", True)


def test_gates_cost_what_they_say(tiny: Model) -> None:
    base = count(tiny)
    for more, gates in (({}, 4), ({"kind": "element"}, 32)):
        cost = count(swapped(GatedAttentionSwap.model_validate(more), tiny))
        assert cost.params - base.params == 6 * 32 * gates
        assert cost.flops_per_token - base.flops_per_token == 6 * 2 * 32 * gates
        assert cost.kv_bytes_per_token == base.kv_bytes_per_token


@pytest.mark.parametrize("more", [{}, {"kind": "element"}, {"kind": "element", "position": "after_o"}])
def test_gates_multiply_what_heads_take_in(more: dict[str, Any], tiny: Model) -> None:
    method = GatedAttentionSwap.model_validate(more | {"init": "random"})
    model = swapped(method, tiny)
    block: Any = model.module("layers.1.attention")
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    step = model.step(torch.zeros(2, 7, dtype=torch.long))
    gates = torch.sigmoid(x @ block.gate.weight.T)
    if "position" in more:
        want = block.o(block.mixed(x, step)) * gates
    else:
        want = block.o((block.mixed(x, step).view(2, 7, 4, 8) * gates.view(2, 7, 4, -1)).flatten(2))
    torch.testing.assert_close(block(x, step), want)
    torch.testing.assert_close(evaluate(expand(block), block, x, step)[0], want)


def test_gated_models_generate_and_have_a_program(tiny: Model) -> None:
    gated = swapped(GatedAttentionSwap(), tiny)
    assert torch.equal(generate(gated, IDS, max_new_tokens=4), generate(tiny, IDS, max_new_tokens=4))
    assert lower(on_meta(gated)).plan.calls


def said(method: Any, model: Model) -> tuple[str, str]:
    first = method.refuses(on_meta(model), ())[0]
    return first.code, first.render()


def test_what_cannot_be_gated_is_refused(tiny: Model) -> None:
    code, words = said(GatedAttentionSwap(select=("mlp",)), tiny)
    assert (code, "`layers.0.mlp` is none" in words) == ("E320", True)
    assert said(GatedAttentionSwap(), swapped(GatedAttentionSwap(), tiny))[0] == "E320"
    small = swapped(RTN(bits=8), tiny)
    assert said(GatedAttentionSwap(), small)[0] == "E323"
    assert not GatedAttentionSwap(init="random").refuses(small)
    assert said(GatedAttentionSwap(), swapped(Recursive(loops=2), tiny))[0] == "E341"
    with pytest.raises(ValueError, match="behind W_o there are no heads"):
        GatedAttentionSwap(position="after_o")


# -- norms


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_centered_writers_make_layer_norms_rms_norms(tied: bool, experts: bool) -> None:
    model = plain(tied=tied, experts=experts)
    method = LayerNormSwap.model_validate(FIRST | {"mode": "exact"})
    same = swapped(method, model)
    assert {unit.form for _, unit in same.units() if isinstance(unit, Norm)} == {"rms"}
    assert difference(outputs(model, IDS), outputs(same, IDS)) < 1e-5
    assert difference(widened(model)(IDS), widened(swapped(method, widened(model)))(IDS)) < 1e-9
    assert probe(method, model, same).held
    assert count(same).params - count(model).params == (48 * 32 if tied else 0)


def test_parallel_layers_are_centered_as_well() -> None:
    model = plain(order="parallel")
    same = swapped(LayerNormSwap.model_validate(FIRST | {"mode": "exact"}), model)
    assert difference(outputs(model, IDS), outputs(same, IDS)) < 1e-5


def test_without_centering_the_function_moves() -> None:
    model = plain()
    method = LayerNormSwap.model_validate(FIRST)
    other = swapped(method, model)
    assert difference(outputs(model, IDS), outputs(other, IDS)) > 1e-3
    assert probe(method, model, other).fidelity == "HEALED"
    assert count(other).params == count(model).params


def test_batch_norms_become_norms_of_a_sample() -> None:
    """Rows of a batch do not reach each other any more, and gains and shifts stay."""
    import effc

    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)
    )
    dice = torch.Generator().manual_seed(0)
    with torch.no_grad():
        network[1].weight.copy_(torch.rand(8, generator=dice) + 0.5)
        network[1].bias.copy_(torch.randn(8, generator=dice))
    x = torch.randn(2, 3, 6, 6, generator=dice)
    model: Any = effc.trace(network.eval(), (x,))
    swapped_: Any = swapped(LayerNormSwap(), model)
    inner = network[0](x)
    flat = inner.flatten(1)
    normed = (
        (flat - flat.mean(1, keepdim=True)) / (flat.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    ).view_as(inner)
    want = network[4](
        torch.relu(normed * network[1].weight.view(-1, 1, 1) + network[1].bias.view(-1, 1, 1)).flatten(1)
    )
    with torch.no_grad():
        torch.testing.assert_close(swapped_.gm(x), want)


def test_what_cannot_be_normed_otherwise_is_refused(tiny: Model) -> None:
    code, words = said(LayerNormSwap.model_validate(FIRST), tiny)
    assert (code, "the model has no layernorm to replace" in words) == ("E320", True)
    assert "RMS norms" in words
    assert "no batchnorm" in said(LayerNormSwap(), plain())[1]
    exact = LayerNormSwap.model_validate(FIRST | {"mode": "exact"})
    assert "the stream itself is normed" in said(exact, plain(order="post"))[1]
    assert "reads the stream as it is" in said(exact, plain(norm=False))[1]
    assert said(exact, swapped(RTN(bits=8), plain()))[0] == "E323"
    for wrong in (
        {"from": "batchnorm", "to": "rmsnorm"},
        {"from": "layernorm", "to": "layernorm"},
        {"from": "batchnorm", "mode": "exact"},
    ):
        with pytest.raises(ValueError, match="validation error"):
            LayerNormSwap.model_validate(wrong)


# -- residual branches


@pytest.mark.parametrize("rule", ["inv_sqrt_depth", "inv_depth", "learned", 0.3])
def test_folded_scales_leave_the_function(rule: Any) -> None:
    for model in (filled(blank()), plain(experts=True)):
        method = ResidualScale(lambda_=rule)
        scaled = swapped(method, model)
        assert difference(outputs(model, IDS), outputs(scaled, IDS)) < 1e-5
        assert probe(method, model, scaled).held
        assert probe(method, model, scaled).fidelity == "EXACT"


def test_scales_are_by_depth_and_cost_a_number_where_learned(tiny: Model) -> None:
    half = swapped(ResidualScale(lambda_="inv_sqrt_depth"), tiny)
    scale: Any = half.module("layers.3.mlp_scale")
    assert scale.factor == 6**-0.5
    assert count(half).params == count(tiny).params
    learned = swapped(ResidualScale(lambda_="learned"), tiny)
    assert isinstance(learned.module("layers.3.attention_scale"), LearnedScale)
    assert count(learned).params == count(tiny).params + 12
    assert lower(on_meta(half)), "a fixed factor is lowered"


def test_without_fold_a_branch_counts_less(tiny: Model) -> None:
    """At lambda near zero nothing is left but the stream."""
    quiet = swapped(ResidualScale(lambda_=1e-6, fold=False), tiny)
    x = tiny.module("embedding").weight[IDS]
    want = tiny.module("head")(tiny.module("norm")(x))
    torch.testing.assert_close(outputs(quiet, IDS), want, rtol=1e-3, atol=1e-4)
    assert probe(ResidualScale(fold=False), tiny, quiet).fidelity == "HEALED"


def test_norms_go_where_asked(tiny: Model) -> None:
    bare = swapped(ResidualScale(norm="remove"), tiny)
    assert [path for path, unit in bare.units() if isinstance(unit, Norm)] == ["norm"]
    assert bool(outputs(bare, IDS).isfinite().all())


def test_scaled_layers_still_move_and_quantize(tiny: Model) -> None:
    scaled = swapped(ResidualScale(), tiny)
    small = swapped(RTN(bits=8), scaled)
    assert difference(outputs(scaled, IDS), outputs(small, IDS)) < 0.1
    data = Context(data={"data": Sequences(scaled)})
    assert run_stage(Lora(data=Ref("code"), steps=1, batch=2), [scaled], data).model.layers == 6


def test_what_cannot_be_scaled_is_refused(tiny: Model) -> None:
    assert "the stream behind `layers.0.attention` is normed" in said(ResidualScale(), plain(order="post"))[1]
    assert said(ResidualScale(), swapped(RTN(bits=8), tiny))[0] == "E323"
    assert said(ResidualScale(), swapped(Recursive(loops=2), tiny))[0] == "E341"
    assert not ResidualScale(fold=False).refuses(swapped(RTN(bits=8), tiny))
    for wrong in ({"lambda": 0.0}, {"lambda": -1.0}, {"lambda": "depth"}):
        with pytest.raises(ValueError, match="validation error"):
            ResidualScale.model_validate(wrong)


def test_gated_attention_is_a_block_of_its_own() -> None:
    with pytest.raises(ValueError, match="behind W_o there are no heads"):
        GatedAttention(width=8, heads=2, kv_heads=2, head_dim=4, position="after_o")
