"""What a mixture can be told, and networks that train side by side: gates, balance, averaging, sharing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from effc.compiler.blocks import MLP, Averaged, MoE, Tempered, Unit
from effc.compiler.blocks.tempered import kept
from effc.compiler.cost import count
from effc.compiler.method import Context
from effc.compiler.model import Model
from effc.compiler.op_graph import evaluate, expand
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Rewrite
from effc.passes.adapt.full import Full
from effc.passes.moe.ewa import Ewa
from effc.passes.moe.global_balance import GlobalBalance
from effc.passes.moe.temperature_gate import TemperatureGate
from effc.passes.moe.top_k import TopK
from effc.passes.moe.widenet import WideNet
from effc.runtime.fit import fit
from effc.specs.recipe import Ref

from .tiny_models import HIDDEN, VOCAB, WIDTH, Sequences, blank, filled, outputs

IDS = torch.arange(36).view(3, 12)
FORMS: dict[str, Any] = {"data": Ref("code"), "steps": 3, "batch": 4, "precision": "fp32"}
X = torch.randn(3, 12, WIDTH, generator=torch.Generator().manual_seed(0))


def rewritten(method: Rewrite, model: Model) -> Model:
    rw = Rewriter(model, method.kind)
    method.rewrite(rw)
    return rw.done()


def trained(model: Model, **more: Any) -> Model:
    return fit(Full(**FORMS | more), model, Context(data={"data": Sequences(model)})).model


def same(a: Model, b: Model) -> bool:
    return bool(torch.allclose(outputs(a, IDS), outputs(b, IDS), atol=1e-5))


def expands(block: Unit) -> None:
    """Ops and forward compute the same."""
    step = filled(blank(layers=1)).step(IDS)
    torch.testing.assert_close(evaluate(expand(block), block, X, step)[0], block(X), rtol=1e-5, atol=1e-5)


# -- moe.top_k


def test_more_experts_run_and_cost_as_many(mixture: Model) -> None:
    three = rewritten(TopK(k=3), mixture)
    assert count(three).flops_per_token - count(mixture).flops_per_token == 2 * 6 * WIDTH * HIDDEN
    assert count(three).params == count(mixture).params
    assert not same(three, mixture)
    assert same(rewritten(TopK(k=2, order="softmax_topk"), three), mixture), "both orders are one with renorm"
    whole = rewritten(TopK(k=4, order="softmax_topk", renorm=False), mixture)
    assert same(whole, rewritten(TopK(k=4), mixture)), "no mass is left out of all"
    assert not same(rewritten(TopK(k=2, order="softmax_topk", renorm=False), mixture), mixture)
    assert three.module("layers.0.moe").experts is not mixture.module("layers.0.moe").experts


def test_top_k_refuses_in_the_words_of_its_card(tiny: Model, mixture: Model) -> None:
    (many,) = TopK(k=5).refuses(mixture)
    assert (many.code, many.help) == ("E331", "use k = 4 or less")
    (dense,) = TopK().refuses(tiny)
    assert (dense.code, dense.help) == ("E320", "make mixtures first with moe.upcycle")
    (same_,) = TopK(k=2).refuses(mixture)
    assert same_.title == "`moe.top_k` would change nothing"
    (one,) = TopK(k=1).refuses(mixture)
    assert (one.code, one.severity, one.about) == ("W331", "warning", "k")
    assert not TopK(k=1, order="softmax_topk", renorm=False).refuses(mixture)
    with pytest.raises(ValueError, match="sums to one"):
        TopK(renorm=False)


def test_one_expert_with_weight_one_gives_its_router_no_gradient(mixture: Model) -> None:
    for method, moves in ((TopK(k=1), False), (TopK(k=1, order="softmax_topk", renorm=False), True)):
        model = rewritten(method, mixture)
        router = model.module("layers.0.moe.router")
        router.weight.requires_grad_()
        model(IDS).square().sum().backward()
        moved = 0.0 if router.weight.grad is None else float(router.weight.grad.norm())
        assert (moved > 1e-3) is moves


# -- moe.global_balance


def test_balance_is_set_and_changes_no_output(mixture: Model) -> None:
    even = rewritten(GlobalBalance(coef=0.5, per_layer=False), mixture)
    assert torch.equal(outputs(even, IDS), outputs(mixture, IDS))
    block = even.module("layers.1.moe")
    assert (block.balance, block.scope, block.pooled) == (0.5, "global", True)
    assert GlobalBalance(coef=0.5, per_layer=False).refuses(even)[0].code == "E325"
    off = rewritten(GlobalBalance(coef=0.0), even)
    done = fit(Full(**FORMS), off, Context(data={"data": Sequences(mixture)}))
    assert "balance" not in done.measures["curve"]["losses"]


def test_parts_of_a_step_share_their_counts(mixture: Model) -> None:
    """In one part both scopes are the classic loss; in four, the global one is nearer to balance."""

    def balance(scope: str, parts: int) -> float:
        model = rewritten(GlobalBalance(coef=1.0, scope=scope), mixture)  # type: ignore[arg-type]
        method = Full(**FORMS | {"steps": 1, "accumulate": parts})
        measured = fit(method, model, Context(data={"data": Sequences(mixture)})).measures
        return float(measured["curve"]["losses"]["balance"][0])

    assert balance("global", 1) == pytest.approx(balance("micro", 1))
    assert balance("global", 4) < balance("micro", 4)


# -- moe.temperature_gate


def test_the_gate_runs_all_experts_and_falls_in_training(mixture: Model) -> None:
    soft = rewritten(TemperatureGate(act="tanh", start=2.0, end=0.5, sparsify_at=0.0), mixture)
    block = soft.module("layers.0.moe")
    assert isinstance(block, Tempered)
    scores = torch.tanh(X.view(-1, WIDTH) @ block.router.weight.t())
    torch.testing.assert_close(block.probabilities(X.view(-1, WIDTH)), (scores / 0.5).softmax(-1))
    block.train()
    heats = []
    for progress in (0.0, 0.5, 1.0):
        block.progress = progress
        heats.append(block.heat)
    assert heats == pytest.approx([2.0, 1.0, 0.5])
    assert count(soft).flops_per_token - count(mixture).flops_per_token == 2 * 2 * 6 * WIDTH * HIDDEN
    assert count(soft).params - count(mixture).params == 2 * 4
    after = trained(soft)
    assert not torch.equal(after.module("layers.0.moe.router").bias, soft.module("layers.0.moe.router").bias)
    assert after.module("layers.0.moe").heat == 0.5


def test_small_weights_are_left_out_and_the_rest_sum_to_one() -> None:
    p = torch.tensor([[0.6, 0.3, 0.06, 0.04], [0.25, 0.25, 0.25, 0.25]])
    weights, chosen = kept(p, 0.1)
    torch.testing.assert_close(weights[0], torch.tensor([2 / 3, 1 / 3, 0, 0]))
    assert chosen[0].tolist() == [0, 1, 4, 4]
    assert kept(p, 0.5)[1].tolist() == [[0, 4, 4, 4], [0, 1, 2, 3]]
    assert kept(p, 0.0)[0].sum(1).tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize("least", [0.0, 0.2, 0.3])
@pytest.mark.parametrize("act", ["sigmoid", "none", "gelu"])
def test_the_gate_expands_into_what_it_computes(act: Any, least: float, mixture: Model) -> None:
    model = rewritten(TemperatureGate(act=act, start=0.5, end=0.5, sparsify_at=least), mixture)
    expands(model.module("layers.0.moe"))  # type: ignore[arg-type]


def test_temperature_refuses_in_the_words_of_its_card(tiny: Model, mixture: Model) -> None:
    with pytest.raises(ValueError, match=r"would rise from start = 0\.2 to end = 0\.3"):
        TemperatureGate(start=0.2)
    (slow,) = TemperatureGate(act="none").refuses(mixture)
    assert (slow.code, slow.severity) == ("W331", "warning")
    assert TemperatureGate().refuses(tiny)[0].code == "E320"
    soft = rewritten(TemperatureGate(), mixture)
    assert TemperatureGate().refuses(soft)[0].code == "E320"


# -- moe.ewa


def test_copies_start_and_end_as_one_block(tiny: Model) -> None:
    wide = rewritten(Ewa(experts=4), tiny)
    assert [n for n, unit in wide.units() if isinstance(unit, Averaged)] == [
        f"layers.{i}.moe" for i in (1, 3, 5)
    ]
    assert same(wide, tiny)
    feed = 3 * WIDTH * HIDDEN
    assert count(wide).params - count(tiny).params == 3 * 3 * feed
    assert count(wide).flops_per_token == count(tiny).flops_per_token
    after = trained(wide)
    parts = after.module("layers.1.moe.experts.up").weight
    assert not torch.equal(parts[0], parts[1])
    plain = rewritten(Ewa(finish="average"), after)
    assert same(plain, after)
    assert count(plain) == count(tiny)
    assert not any(isinstance(unit, Averaged) for _, unit in plain.units())
    assert plain.roles == tiny.roles
    torch.testing.assert_close(plain.module("layers.1.mlp.up").weight, parts.mean(0))


def test_averaging_keeps_the_mean_and_shrinks_the_rest() -> None:
    block = Averaged(width=4, hidden=4, experts=4, beta=0.3)
    w = torch.randn(4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    after = block.pulled(w, 0.5)
    torch.testing.assert_close(after.mean(0), w.mean(0), rtol=0, atol=1e-15)
    gap = 1 - 0.15 * 4 / 3
    torch.testing.assert_close(after - w.mean(0), gap * (w - w.mean(0)))
    others = (w.sum(0) - w[1]) / 3
    torch.testing.assert_close(after[1], 0.85 * w[1] + 0.15 * others)
    torch.testing.assert_close(block.pulled(w, 0.0), w)
    steady = Averaged(width=4, hidden=4, experts=4, beta=0.3, ramp=False)
    torch.testing.assert_close(steady.pulled(w, 0.0), block.pulled(w, 1.0))


def test_training_deals_tokens_out_evenly_and_averages_after_each_step(tiny: Model) -> None:
    wide = rewritten(Ewa(experts=5, every=6), tiny)
    block = wide.module("layers.5.moe")
    assert isinstance(block, Averaged)
    counts: dict[int, int] = {}
    block.experts.up.register_forward_pre_hook(lambda _, args: counts.__setitem__(args[1], len(args[0])))
    block.train()
    block(X)  # 36 tokens
    assert sorted(counts.values()) == [7, 7, 7, 7, 8]
    spread = []
    for beta in (0.01, 0.7):
        made = trained(rewritten(Ewa(experts=4, every=2, beta=beta, ramp="none"), tiny))
        parts = made.module("layers.1.moe.experts.up").weight
        spread.append(float((parts - parts.mean(0)).norm()))
    assert spread[1] < 0.6 * spread[0]


def test_the_mean_expands_into_what_it_computes(tiny: Model) -> None:
    expands(rewritten(Ewa(experts=3, every=1), tiny).module("layers.0.moe"))  # type: ignore[arg-type]


def test_ewa_refuses_in_the_words_of_its_card(tiny: Model) -> None:
    with pytest.raises(ValueError, match=r"2 experts pass each other at 0\.5"):
        Ewa(experts=2, beta=0.5)
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        Ewa(experts=1)
    wide = rewritten(Ewa(experts=3, every=2), tiny)
    (twice,) = Ewa().refuses(wide)
    assert twice.notes == ("layers.1.moe holds 3 of them",)
    assert Ewa(finish="average").refuses(tiny)[0].code == "E320"
    assert Ewa(every=7).refuses(tiny)[0].about == "every"


# -- moe.widenet


def test_layers_share_one_attention_and_one_mixture(tiny: Model) -> None:
    thin = rewritten(WideNet(experts=3), tiny)
    attention, feed = 3 * WIDTH * WIDTH, 3 * WIDTH * HIDDEN
    assert count(thin).params == VOCAB * WIDTH + attention + 3 * feed + 3 * WIDTH + 6 * 2 * WIDTH + WIDTH
    assert count(thin).kv_bytes_per_token == count(tiny).kv_bytes_per_token
    per_layer = 2 * (attention + 2 * feed + 3 * WIDTH)
    assert count(thin).flops_per_token == 6 * per_layer + 2 * VOCAB * WIDTH
    for layer in range(1, 6):
        for name in ("attention.q", "moe.router", "moe.experts.down"):
            one, other = (thin.module(f"layers.{i}.{name}").weight for i in (0, layer))
            assert one is other
        assert thin.module(f"layers.{layer}.norm1").weight is not thin.module("layers.0.norm1").weight
    mean = torch.stack([tiny.module(f"layers.{i}.attention.v").weight for i in range(6)]).mean(0)
    torch.testing.assert_close(thin.module("layers.4.attention.v").weight, mean)
    for expert, layer in enumerate((0, 2, 5)):
        mine = thin.module("layers.3.moe.experts.up").weight[expert]
        assert torch.equal(mine, tiny.module(f"layers.{layer}.mlp.up").weight)
    assert outputs(thin, IDS).shape == (3, 12, VOCAB)


def test_groups_share_apart_and_training_keeps_them_tied(tiny: Model) -> None:
    thin = rewritten(WideNet(experts=2, groups=2, init="first"), tiny)
    assert thin.module("layers.2.moe.router").weight is thin.module("layers.0.moe.router").weight
    assert thin.module("layers.3.moe.router").weight is not thin.module("layers.0.moe.router").weight
    assert torch.equal(thin.module("layers.5.attention.q").weight, tiny.module("layers.3.attention.q").weight)
    after = trained(thin)
    assert after.ties() == thin.ties()
    assert not torch.equal(after.module("layers.0.norm1").weight, after.module("layers.1.norm1").weight)


def test_widenet_refuses_in_the_words_of_its_card(tiny: Model, mixture: Model) -> None:
    assert WideNet(groups=4).refuses(tiny)[0].help == "use groups in {1, 2, 3, 6}"
    assert WideNet(experts=4, groups=2).refuses(tiny)[0].help == "use at most 3 experts, or fewer groups"
    (equal,) = WideNet(norms="shared").refuses(tiny)
    assert (equal.code, equal.severity, equal.about) == ("W332", "warning", "norms")
    assert WideNet().refuses(mixture)[0].code == "E320"
    odd = filled(blank())
    rw = Rewriter(odd)
    rw.swap("layers.3.mlp", MLP(width=WIDTH, hidden=16))
    assert WideNet().refuses(rw.model)[0].title == "layers 0 and 3 cannot share weights"
    shared = rewritten(WideNet(norms="shared"), tiny)
    assert shared.module("layers.4.norm2").weight is shared.module("layers.0.norm2").weight
    assert isinstance(shared.module("layers.0.moe"), MoE)
