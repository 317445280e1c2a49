"""Stacking, factoring and sharing layers: algebra that must hold, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effc.compiler import graph_json
from effc.compiler.blocks import Linear, LoraLinear, QuantLinear
from effc.compiler.blocks.low_rank_linear import LowRankLinear
from effc.compiler.contract import Fact
from effc.compiler.cost import count
from effc.compiler.facts import holds
from effc.compiler.method import Context
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Rewrite
from effc.passes._moment import Moment
from effc.passes.grow.stack import Stack
from effc.passes.prune.depth import Depth
from effc.passes.quantize.gptq import GPTQ
from effc.passes.quantize.rtn import RTN
from effc.passes.reparam.low_rank import LowRank, factors
from effc.passes.tie.recursive import Recursive
from effc.runtime.calibrate import calibrate
from effc.runtime.generate import generate
from effc.runtime.parts.reparam.rank.energy import Energy
from effc.runtime.watch import Snapshot, restore
from effc.specs.recipe import Ref
from effc.specs.units import Gradient

from .tiny_models import Sequences, blank, filled, on_meta, outputs

CODE = Ref("code")
IDS = torch.arange(36).view(3, 12)


def rewritten(method: Rewrite, model: Model) -> Model:
    rw = Rewriter(model, method.kind)
    method.rewrite(rw)
    return rw.done()


def gap(a: Model, b: Model) -> float:
    """||a(ids) - b(ids)|| / ||b(ids)||"""
    left, right = outputs(a, IDS), outputs(b, IDS)
    return float((left - right).norm() / right.norm())


@pytest.mark.parametrize(
    ("order", "layout"), [("stack", [0, 1, 2, 0, 1, 2, 0, 1, 2]), ("interleave", [0, 0, 0, 1, 1, 1, 2, 2, 2])]
)
def test_stack_copies_layers_by_its_map(order: str, layout: list[int]) -> None:
    model = filled(blank(layers=3))
    big = rewritten(Stack(factor=3, order=order), model)  # type: ignore[arg-type]
    assert big.layers == 9
    for new, old in enumerate(layout):
        for name in ("attention.q", "mlp.down", "norm2"):
            mine, source = big.module(f"layers.{new}.{name}"), model.module(f"layers.{old}.{name}")
            assert torch.equal(mine.weight, source.weight)
    assert big.ties() == model.ties()
    assert count(big).params - count(model).params == 2 * (count(model).params - 48 * 32 - 32)


def test_a_stack_with_copies_that_add_nothing_is_the_model_itself() -> None:
    model = filled(blank(layers=2))
    big = rewritten(Stack(factor=2), model)
    for layer in (2, 3):
        for name in ("attention.o", "mlp.down"):
            big.place(
                f"layers.{layer}.{name}.weight", torch.zeros_like(big.module(f"layers.{layer}.{name}").weight)
            )
    assert gap(big, model) < 1e-6


def test_stack_refuses_what_is_packed_or_tied(tiny: Model) -> None:
    small = rewritten(RTN(bits=8), tiny)
    assert "reorder the recipe: grow, then prune, then quantize" in Stack().refuses(small)[0].render()
    shared = rewritten(Recursive(loops=2), tiny)
    assert "share weights" in Stack().refuses(shared)[0].render()


def planted(rows: int, inputs: int, rank: int, seed: int = 0) -> Tensor:
    dice = torch.Generator().manual_seed(seed)
    return torch.randn(rows, rank, generator=dice) @ torch.randn(rank, inputs, generator=dice)


def test_a_planted_rank_is_found() -> None:
    w = planted(128, 128, 8)
    b, a, error = factors(w, 8, None)
    assert error < 1e-5
    assert float((b @ a - w).norm() / w.norm()) < 1e-5
    assert b.shape == (128, 8)
    assert a.shape == (8, 128)


def test_the_error_is_the_tail_of_the_spectrum() -> None:
    w = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    b, a, error = factors(w, 10, None)
    tail = torch.linalg.svdvals(w.double())[10:].square().sum().sqrt()
    assert float((w - b @ a).norm()) == pytest.approx(float(tail), rel=1e-4)
    assert error == pytest.approx(float(tail / w.norm()), rel=1e-4)


def test_the_activation_metric_minimizes_the_output_error() -> None:
    dice = torch.Generator().manual_seed(3)
    w = torch.randn(32, 48, generator=dice)
    x = torch.randn(600, 48, generator=dice) * torch.logspace(0, -2, 48)
    x = x @ torch.linalg.qr(torch.randn(48, 48, generator=dice)).Q
    moment = Moment(48)
    moment.add(x)
    root = torch.linalg.cholesky(moment.mean().double() + 1e-9 * torch.eye(48, dtype=torch.float64))
    b, a, error = factors(w, 12, root)
    y = w.double() @ x.double().T
    mine = float((y - b @ a @ x.double().T).norm() / y.norm())
    plain_b, plain_a, _ = factors(w, 12, None)
    plain = float((y - (plain_b @ plain_a).double() @ x.double().T).norm() / y.norm())
    assert mine == pytest.approx(error, rel=1e-3)
    assert mine < 0.5 * plain


def test_low_rank_with_and_without_data(tiny: Model) -> None:
    data = Sequences(tiny, 48)
    context = Context(data={"data": data})
    chosen = ("mlp.down", "attention.o")
    by_weight = calibrate(LowRank(rank=8, select=chosen), tiny, context)
    by_input = calibrate(LowRank(rank=8, select=chosen, metric="activation", data=CODE), tiny, context)
    assert by_weight.measures["sequences"] == 0
    assert by_input.measures["sequences"] == 48
    exact = outputs(tiny, data.ids)
    errors = [float((outputs(o.model, data.ids) - exact).norm()) for o in (by_input, by_weight)]
    assert errors[0] < errors[1]
    assert count(tiny).params - count(by_input.model).params == 6 * (32 * 48 - 8 * 80 + 32 * 32 - 8 * 64)


def test_low_rank_refuses_what_saves_nothing_or_is_shared(tiny: Model) -> None:
    said = "\n".join(d.render() for d in LowRank(rank=20, select=("mlp",)).refuses(on_meta(tiny)))
    assert "rank 20 saves nothing at layers.0.mlp.gate and 11 more [48, 32]" in said
    assert "1600 weights instead of 1536" in said
    assert "at most 19, or 59%" in said
    assert "E341" in LowRank(rank=2, select=("head",)).refuses(tiny)[0].render()
    with pytest.raises(ValueError, match="needs calibration sequences"):
        LowRank(metric="activation")
    with pytest.raises(ValueError, match="looks at no data"):
        LowRank(data=CODE)


@pytest.mark.parametrize("share", ["cycle", "sequence", "middle_cycle", "middle_sequence"])
@pytest.mark.parametrize("init", ["average", "stepwise", "lower", "upper"])
def test_full_rank_differences_give_the_same_model(share: str, init: str, tiny: Model) -> None:
    method = Recursive(loops=2, share=share, init=init, lora_rank=16)  # type: ignore[arg-type]
    model = filled(blank())
    for seed, path in enumerate(model.paths("mlp") + model.paths("attention")):
        weight = model.module(path).weight  # of rank 8, so that every difference has rank 16 at most
        weight.data.copy_(planted(*weight.shape, 8, seed) * 0.05)
    looped = rewritten(method, model)
    assert gap(looped, model) < 1e-4
    strict = rewritten(method.model_copy(update={"lora_rank": 0}), model)
    assert gap(strict, model) > 0.01
    assert count(strict).flops_per_token == count(model).flops_per_token


def test_every_layer_may_have_a_rank_of_its_own(tiny: Model) -> None:
    method = Recursive(loops=2, lora_rank=Gradient(1, 11))
    assert method.ranks(6) == [1, 3, 5, 7, 9, 11]
    looped = rewritten(method, tiny)
    for layer, rank in enumerate(method.ranks(6)):
        unit = looped.module(f"layers.{layer}.mlp.up")
        assert unit.rank == rank
        own = tiny.module(f"layers.{layer}.mlp.up").weight
        tail = torch.linalg.svdvals((own - unit.base.weight).double())[rank:].square().sum().sqrt()
        left = own - unit.base.weight - unit.change()
        assert float(left.norm()) == pytest.approx(float(tail), rel=1e-3)
    none = rewritten(Recursive(loops=2, lora_rank=Gradient(0, 5)), tiny)
    assert isinstance(none.module("layers.0.mlp.up"), Linear)
    assert isinstance(none.module("layers.5.mlp.up"), LoraLinear)
    with pytest.raises(ValueError, match="0 or more"):
        Recursive(lora_rank=Gradient(-1, 5))
    (told,) = Recursive(loops=2, lora_rank=Gradient(1, 40)).refuses(on_meta(tiny))
    assert told.help == "use a rank of at most 16"


def test_random_weights_have_the_deviation_of_what_they_replace(tiny: Model) -> None:
    looped = rewritten(Recursive(loops=2, init="random"), tiny)
    mine, theirs = (m.module("layers.1.mlp.up").weight for m in (looped, tiny))
    assert float(mine.std()) == pytest.approx(float(theirs.std()), rel=0.1)
    assert abs(float((mine * theirs).mean())) < 0.1 * float(theirs.var())
    assert looped.module("layers.4.mlp.up").weight is mine
    exact = rewritten(Recursive(loops=2, init="random", lora_rank=16), tiny)
    for layer in (1, 4):
        unit = exact.module(f"layers.{layer}.attention.k")
        own = tiny.module(f"layers.{layer}.attention.k").weight
        torch.testing.assert_close(unit.base.weight + unit.change(), own, rtol=1e-4, atol=1e-5)


def test_slots_follow_the_map() -> None:
    assert Recursive(loops=2).slots(6) == [[0, 3], [1, 4], [2, 5]]
    assert Recursive(loops=2, share="sequence").slots(6) == [[0, 1], [2, 3], [4, 5]]
    assert Recursive(loops=2, share="middle_cycle").slots(6) == [[1, 3], [2, 4]]
    assert Recursive(loops=3, init="stepwise").sources(6) == [[0], [5]]
    assert Recursive(loops=2, init="lower").sources(6) == [[0], [1], [2]]
    assert Recursive(loops=2, init="upper").sources(6) == [[3], [4], [5]]
    assert Recursive(loops=2).sources(6) == [[0, 3], [1, 4], [2, 5]]


def test_shared_weights_are_stored_once_and_start_as_asked(tiny: Model) -> None:
    looped = rewritten(Recursive(loops=2, init="average"), tiny)
    mean = (tiny.module("layers.1.mlp.up").weight + tiny.module("layers.4.mlp.up").weight) / 2
    for layer in (1, 4):
        assert torch.allclose(looped.module(f"layers.{layer}.mlp.up").weight, mean)
        assert torch.equal(
            looped.module(f"layers.{layer}.norm1").weight, tiny.module(f"layers.{layer}.norm1").weight
        )
    block = 32 * 32 * 3 + 48 * 32 * 3
    assert count(tiny).params - count(looped).params == 3 * block
    assert count(rewritten(Recursive(loops=2, tie_norms=True), tiny)).params == count(looped).params - 3 * 64
    smaller = gap(rewritten(Recursive(loops=2, lora_rank=12), tiny), tiny)
    assert smaller < gap(looped, tiny)


def test_shared_weights_get_the_sum_of_gradients(tiny: Model) -> None:
    looped = rewritten(Recursive(loops=2, init="lower"), tiny)
    weight = looped.module("layers.0.mlp.up").weight.requires_grad_()
    outputs_sum = looped(IDS).square().sum()
    outputs_sum.backward()
    apart = looped.clone()
    parts = []
    for layer in (0, 3):
        unit = apart.module(f"layers.{layer}.mlp.up")
        unit.weight = torch.nn.Parameter(weight.detach().clone())
        parts.append(unit.weight)
    apart(IDS).square().sum().backward()
    assert weight.grad is not None
    assert torch.allclose(weight.grad, parts[0].grad + parts[1].grad, rtol=1e-3, atol=1e-4)


def test_recursive_refuses_in_the_words_of_its_card(tiny: Model) -> None:
    bare = on_meta(tiny)
    said = [Recursive(loops=4).refuses(bare), Recursive(loops=2, lora_rank=40).refuses(bare)]
    assert said[0][0].title == "6 layers do not divide into 4 loops"
    assert said[0][0].help == "use loops in {2, 3, 6}"
    assert said[1][0].help == "use a rank of at most 16"
    looped = rewritten(Recursive(loops=2), tiny)
    assert "share weights already" in Recursive(loops=3).refuses(looped)[0].title
    odd = filled(blank())
    odd.module("layers.4.mlp").up = type(odd.module("layers.4.mlp.up"))(
        in_features=32, out_features=48, bias=True
    )
    assert Recursive(loops=2).refuses(odd)[0].notes == ("they differ in mlp.up",)


def test_depth_and_recursion_compose(tiny: Model) -> None:
    data = Sequences(tiny)
    thin = calibrate(Depth(data=CODE, keep=4), tiny, Context(data={"data": data})).model
    looped = rewritten(Recursive(loops=2, lora_rank=2), thin)
    assert looped.layers == 4
    assert outputs(looped, IDS).shape == (3, 12, 48)


@pytest.mark.parametrize("packs", ["rtn", "gptq"])
def test_layers_that_share_are_packed_once_beneath_their_differences(packs: str) -> None:
    looped = rewritten(Recursive(loops=2, lora_rank=2), filled(blank(layers=4)))
    method = RTN(bits=8) if packs == "rtn" else GPTQ(data=CODE, bits=8, samples=8)
    assert not method.refuses(looped)
    if isinstance(method, RTN):
        small = rewritten(method, looped)
    else:
        small = calibrate(method, looped, Context(data={"data": Sequences(looped)})).model
    units = [small.module(f"layers.{i}.mlp.up") for i in (0, 2)]
    assert all(isinstance(unit, LoraLinear) and isinstance(unit.base, QuantLinear) for unit in units)
    assert units[0].base.packed is units[1].base.packed
    assert units[0].a is not units[1].a
    assert "layers.2.mlp.up.base.packed" in small.ties()
    assert holds(Fact("packed", "select"), small, method)
    assert gap(small, looped) < 0.02
    assert count(small).params == count(looped).params
    bare = on_meta(looped)
    rw = Rewriter(bare)
    method.outline(rw, ())
    assert count(rw.done()) == count(small)
    back = graph_json.from_json(graph_json.to_json(small))
    for name, tensor in small.tensors().items():
        back.place(name, tensor.detach())
    assert torch.equal(outputs(back, IDS), outputs(small, IDS))
    ids = generate(small, IDS[:2, :5], max_new_tokens=3)
    assert torch.equal(ids[:, 5:], outputs(small, ids[:, :-1]).argmax(-1)[:, 4:])


def test_a_stopped_packing_of_shared_layers_goes_on() -> None:
    looped = rewritten(Recursive(loops=2, lora_rank=2), filled(blank(layers=4)))
    rw = Rewriter(looped)
    before = Snapshot(rw)
    RTN(bits=8).rewrite(rw)
    tensors, data = before.changes(rw, {})
    again = Rewriter(looped)
    restore(again, tensors, data)
    assert again.done().ties() == rw.done().ties()
    assert torch.equal(outputs(again.done(), IDS), outputs(rw.done(), IDS))


def test_energy_takes_the_least_rank_that_holds_it() -> None:
    s = torch.tensor([3.0, 2.0, 1.0, 1.0])  # squares 9, 4, 1, 1 of 15
    assert [Energy(share=share).of(s) for share in (0.5, 0.6, 0.61, 13 / 15, 0.9, 14 / 15, 0.99)] == [
        1, 1, 2, 2, 3, 3, 4,
    ]  # fmt: skip


def test_a_rank_by_energy_follows_the_weights_and_never_grows_them(tiny: Model) -> None:
    low = tiny.module("layers.1.mlp.up")
    low.weight = torch.nn.Parameter(planted(48, 32, 3, seed=5), requires_grad=False)
    method = LowRank(rank=Energy(share=0.97))
    thin = calibrate(method, tiny, Context()).model
    assert thin.module("layers.1.mlp.up").rank <= 3
    assert {type(unit).__name__ for path, unit in thin.units() if path.endswith((".q", ".down"))} == {
        "Linear"
    }
    rw = Rewriter(on_meta(tiny), method.kind)
    method.outline(rw, ())
    assert method.at_most
    assert count(thin).params < count(tiny).params <= count(rw.done()).params


def test_small_weights_stay(tiny: Model) -> None:
    thin = calibrate(LowRank(rank=4, min_dim=20), tiny, Context()).model
    small = {p for p, u in thin.units() if isinstance(u, LowRankLinear)}
    assert small
    assert not {p for p in small if p.endswith((".k", ".v"))}, "16 rows"
    said = LowRank(rank=4, min_dim=64).refuses(tiny)[0]
    assert (said.code, said.about) == ("E340", "min_dim")
    assert "at most 32" in str(said.help)


def test_shared_weights_share_their_factors(tiny: Model) -> None:
    looped = rewritten(Recursive(loops=2), tiny)
    assert LowRank(rank=8).refuses(looped)[0].code == "E341"
    method = LowRank(rank=8, allow_tied=True)
    thin = calibrate(method, looped, Context()).model
    first, second = (thin.module(f"layers.{n}.mlp.up") for n in (1, 4))
    assert first.a is second.a
    assert first.b is second.b
    rw = Rewriter(on_meta(looped), method.kind)
    method.outline(rw, ())
    assert count(rw.done()) == count(thin)
    with_head = LowRank(rank=8, allow_tied=True, select=("head",))
    apart = calibrate(with_head, tiny, Context()).model
    assert isinstance(apart.module("head"), LowRankLinear)
    assert torch.equal(apart.module("embedding").weight, tiny.module("embedding").weight)
    assert count(apart).params == count(tiny).params + 8 * (48 + 32)


def test_full_energy_of_a_low_rank_model_is_the_model() -> None:
    """EXACT where the rank is that of the weight."""
    model = filled(blank(layers=2))
    for seed, path in enumerate(model.paths("mlp") + model.paths("attention")):
        weight = model.module(path).weight
        weight.data.copy_(planted(*weight.shape, 5, seed) * 0.05)
    assert gap(calibrate(LowRank(rank=5), model, Context()).model, model) < 1e-5
    found = calibrate(LowRank(rank=Energy(share=1 - 1e-9)), model, Context()).model
    assert {u.rank for _, u in found.units() if isinstance(u, LowRankLinear)} == {5}
    assert gap(found, model) < 1e-4
