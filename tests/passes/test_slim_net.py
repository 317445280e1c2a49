"""Widths of networks of convolutions with several answers: run, trained, chosen, cut out, and refused."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effc.compiler.cost import count
from effc.compiler.isolation import isolation
from effc.compiler.method import Context
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.trace import TracedModel, trace
from effc.passes.adaptive._fire_net import layer_flops
from effc.passes.adaptive._slim_net import Widths, cut, network, run, sketched, widen
from effc.passes.adaptive._slim_norm import SlimNorm
from effc.passes.adaptive.select import Select
from effc.passes.adaptive.slimmable import Slimmable
from effc.runtime.fit import fit
from effc.runtime.parts.train.optimizer.adamw import AdamW
from effc.specs.recipe import Ref
from tests.claims import Measured

from .convnets import ResNet, stirred
from .digits import Digits, TwoTasks, learned
from .edited import edited
from .tiny_models import on_meta


def method(**more: Any) -> Slimmable:
    return Slimmable.model_validate({"data": Ref("images"), "steps": 1, "batch": 4} | more)


def select(**more: Any) -> Select:
    return Select.model_validate({"budget": 0.5} | more)


def traced(module: nn.Module, *shape: int) -> TracedModel:
    torch.manual_seed(1)
    return trace(stirred(module), torch.randn(*shape))


def two(width: int = 8) -> TracedModel:
    return traced(TwoTasks(width), 3, 1, 16, 16)


def wide(model: TracedModel, *widths: float) -> TracedModel:
    """With norms for all widths, whose statistics differ from state to state."""
    rw = Rewriter(model)
    net = network(model)
    widen(rw, net, net.all((*widths, 1.0), (*widths, 1.0)))
    out = rw.done()
    assert isinstance(out, TracedModel)
    dice = torch.Generator().manual_seed(3)
    for path, norm in out.gm.named_modules():
        if isinstance(norm, SlimNorm):
            for name in ("mean", "variance"):
                t = norm.get_parameter(name).detach().clone()
                t[1:] += 0.2 * torch.rand(t[1:].shape, generator=dice)
                out.place(f"{path}.{name}", t)
    return out


def narrow(model: TracedModel, widths: Widths) -> TracedModel:
    rw = Rewriter(model)
    cut(rw, network(model), widths)
    out = rw.done()
    assert isinstance(out, TracedModel)
    return out


class Grouped(nn.Module):
    """Channels by themselves, in groups, a product with gates, and linears behind a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.alone = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pairs, self.norm = nn.Conv2d(8, 8, 1, groups=4), nn.BatchNorm2d(8, affine=False)
        self.gate = nn.Conv2d(8, 8, 1)
        self.hidden, self.norm1 = nn.Linear(8 * 9, 12), nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.pairs(F.silu(self.alone(F.relu(self.first(x))))))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        x = F.avg_pool2d(x, 2).view(x.shape[0], -1)
        out: Tensor = self.head(F.relu(self.norm1(self.hidden(x))))
        return out


MODELS: dict[str, tuple[Any, tuple[int, ...], list[Widths]]] = {
    "two tasks": (lambda: TwoTasks(8), (3, 1, 16, 16), [(0.5, 0.5, 1.0), (0.25, 1.0, 0.25)]),
    "residual": (lambda: ResNet(8), (3, 3, 16, 16), [(0.5,)]),
    "groups": (Grouped, (3, 3, 12, 12), [(0.25,), (0.5,)]),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_what_is_cut_out_has_the_bits_of_the_network_at_that_width(name: str) -> None:
    make, shape, chosen = MODELS[name]
    model, x = traced(make(), *shape), torch.randn(*shape)
    net = network(model)
    slim = wide(model, 0.25, 0.5) if name != "residual" else wide(model, 0.5)
    whole = (1.0,) * (1 + net.decoders)
    with torch.no_grad():
        plain = model(x) if net.decoders else (model(x),)
        for one in (slim(x) if net.decoders else (slim(x),), run(slim, net, whole, x)[0]):
            assert all(torch.equal(a, b) for a, b in zip(one, plain, strict=True))
        for widths in chosen:
            small = narrow(slim, widths)
            got = small(x) if net.decoders else (small(x),)
            want, _ = run(slim, net, widths, x)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            assert all(not torch.allclose(a, b) for a, b in zip(got, plain, strict=True))
            assert not any(isinstance(m, SlimNorm) for m in small.gm.modules())
            assert sum(layer_flops(small).values()) == sketched(slim, net, widths).flops
            assert count(narrow(on_meta(slim), widths)) == count(small)  # type: ignore[arg-type]


def test_an_encoder_serves_all_answers_and_a_decoder_one() -> None:
    net = network(two())
    assert (net.answers, net.decoders) == (2, 2)
    assert {p for p, r in net.region.items() if r == -1} == {
        "stem", "norm", "down", "norm1", "conv1", "norm2", "conv2", "norm3",
    }  # fmt: skip
    assert {net.region[p] for p in ("kind.conv", "kind.norm", "kind.head")} == {0}
    assert {net.region[p] for p in ("parity.conv", "parity.norm", "parity.head")} == {1}
    assert net.whole == {"kind.head", "parity.head"}
    assert net.border == ["max_pool2d"]
    assert len(net.all((0.5, 1.0), (0.25, 1.0))) == 8
    one = network(traced(ResNet(8), 2, 3, 16, 16))
    assert (one.answers, one.decoders, one.whole) == (1, 0, {"head"})
    assert one.all((0.5, 1.0), (0.25, 1.0)) == [(0.5,), (1.0,)]


def test_a_width_costs_what_its_inputs_and_outputs_are() -> None:
    model = two()
    net = network(model)
    whole = layer_flops(model)
    half = layer_flops(narrow(wide(model, 0.5), (0.5, 1.0, 0.5)))
    assert half["stem"] == whole["stem"] // 2
    assert half["conv1"] == whole["conv1"] // 4
    assert half["kind.conv"] == whole["kind.conv"] // 2
    assert half["parity.conv"] == whole["parity.conv"] // 4
    assert half["kind.head"] == whole["kind.head"]
    assert half["parity.head"] == whole["parity.head"] // 2
    assert sketched(model, net, (1.0, 1.0, 1.0)).flops == sum(whole.values())


def test_norms_have_statistics_for_each_width_that_they_see() -> None:
    rw = Rewriter(two())
    method(widths=(0.5, 1.0)).outline(rw, ())
    norm, behind = rw.module("norm"), rw.module("kind.norm")
    assert norm.states == ((1.0,), (0.5,))
    assert set(behind.states) == {(1.0, 1.0), (1.0, 0.5), (0.5, 1.0), (0.5, 0.5)}
    assert behind.states[0] == (1.0, 1.0)
    meta = Rewriter(on_meta(two()))
    method(widths=(0.5, 1.0)).outline(meta, ())
    assert count(meta.done()) == count(rw.done())


def test_statistics_follow_the_batches_of_their_own_width() -> None:
    norm = SlimNorm(nn.BatchNorm2d(4), [(1.0,), (0.5,)])
    weights = {f"at.{n}": nn.Parameter(getattr(norm, n).detach().clone()) for n in ("mean", "variance")}
    x = torch.randn(8, 2, 3, 3) * 2 + 5
    norm.train()
    y = norm.at(x, 1)
    torch.testing.assert_close(y, F.batch_norm(x, None, None, training=True))
    with torch.no_grad():
        norm.follow("at", weights)
    mean, variance = weights["at.mean"], weights["at.variance"]
    torch.testing.assert_close(mean[1, :2], 0.1 * x.mean((0, 2, 3)))
    torch.testing.assert_close(variance[1, :2], 0.9 + 0.1 * x.var((0, 2, 3)))
    assert not mean[0].any()
    assert not mean[1, 2:].any()
    assert norm.seen == []


def test_training_lowers_the_surprise_of_every_width_and_selecting_meets_the_budget() -> None:
    data = Digits(0, 256, 64, parity=True)
    torch.manual_seed(0)
    model = trace(TwoTasks(8), data.batch("train", range(2)).ids)
    chosen = method(steps=30, batch=32, tasks=(0.7, 0.3), optimizer=AdamW(lr=1e-2), precision="fp32")
    rw = Rewriter(model)
    chosen.outline(rw, ())
    before = chosen.measure(rw.done(), data)["widths"]
    outcome = fit(chosen, model, Context(0, {"data": data}))
    after, slim = outcome.measures["widths"], outcome.model
    assert len(after) == 8
    assert all(after[name] < before[name] - 0.1 for name in after)
    assert set(outcome.measures["right"]) == set(after)
    norm: Any = slim.module("norm2")
    assert float((norm.mean[0] - norm.mean[1])[:4].abs().max()) > 1e-4
    assert isolation(as_traced(slim)).isolated, "at rest every image stands by itself"
    picked = select(budget=0.5)
    assert picked.refuses(slim) == []
    small = edited(picked, slim)
    share = sum(layer_flops(as_traced(small)).values()) / sum(layer_flops(model).values())
    assert share == pytest.approx(picked.costs(slim)[picked.chosen(slim)])
    assert share <= 0.5
    assert select(budget=0.99, pref=(2 / 3, 1 / 3)).chosen(slim) == (1.0, 1.0, 0.5)
    assert select(budget=0.7, pref=(2 / 3, 1 / 3)).chosen(slim) == (0.5, 1.0, 0.5)
    assert select(budget=0.99, pref=(0.5, 0.5)).chosen(slim) == (0.5, 1.0, 1.0)


def as_traced(model: Model) -> TracedModel:
    assert isinstance(model, TracedModel)
    return model


def test_what_the_encoder_and_the_whole_say_is_compared() -> None:
    data = Digits(0, 16, 16, parity=True)
    batch = data.batch("train", range(8))

    def total(**more: Any) -> float:
        chosen = method(random=0, **more)
        rw = Rewriter(two())
        chosen.outline(rw, ())
        return float(chosen.loss(rw.done(), {}, batch)["total"])

    plain = total(ci_kd=0.0)
    assert total(ci_kd=5.0) > plain + 0.05
    assert total(ci_kd=5.0, distance="attention") > plain + 1e-4
    assert total(ci_kd=0.0, out_kd=1.0) > plain + 1e-3
    assert total(ci_kd=9.0, enc_widths=(1.0,)) == pytest.approx(total(ci_kd=0.0, enc_widths=(1.0,)))


class Joined(nn.Module):
    """What the encoder gives beside what a decoder gives; `form` says how."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 1) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(8 if form == "cat" else 4, 2) for _ in range(2))
        self.form = form

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.a(x)
        y, z = self.b(x), self.c(x)
        y = torch.cat((x, y), 1) if self.form == "cat" else x + y
        z = torch.cat((x, z), 1) if self.form == "cat" else z
        return self.heads[0](y.mean((2, 3))), self.heads[1](z.mean((2, 3)))


def said(chosen: Any, model: Model) -> list[tuple[str, str]]:
    return [(d.code, d.title) for d in chosen.refuses(model)]


def test_networks_that_have_no_widths_are_refused() -> None:
    for made in (method, select):
        ((code, title),) = said(made(), traced(Joined("cat"), 2, 4, 6, 6))
        assert (code, "`cat" in title) == ("E323", True)
        for low in (0.25, 0.5):  # at a quarter one channel would be added to four
            ((code, title),) = said(made(widths=(low, 1.0)), traced(Joined("add"), 2, 4, 6, 6))
            assert code == "E331"
            assert "do not go together at widths" in title
        assert said(made(), traced(nn.Sequential(nn.Conv2d(1, 2, 3)), 2, 1, 5, 5))[0][0] == "E320"
        grouped = nn.Sequential(nn.Conv2d(3, 6, 1), nn.GroupNorm(2, 6), nn.Conv2d(6, 2, 1))
        assert said(made(), traced(grouped, 2, 3, 5, 5))[0][0] == "E323"
        twice = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(16, 2))
        twice[1].weight = twice[0].weight
        assert said(made(), traced(twice, 2, 4, 2, 2))[0][0] == "E341"
    ((code, title),) = said(method(widths=(0.3, 1.0)), two())
    assert (code, title) == ("E331", "30% of the 8 channels of stem is no whole number of them")
    grouped_convs = traced(Grouped(), 2, 3, 12, 12)
    ((code, title),) = said(method(widths=(0.375, 1.0)), grouped_convs)
    assert title == "37.5% of the 4 groups of pairs is no whole number of them"
    bare = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 2, 1))
    assert said(method(), trace(bare.eval(), torch.randn(2, 4, 3, 3)))[0][0] == "E320"
    assert said(method(), wide(two(), 0.5))[0][0] == "E325"
    assert said(method(tasks=(1.0,)), two())[0][0] == "E331"


def test_selections_that_cannot_be_are_refused() -> None:
    slim = wide(two(), 0.5)
    assert said(select(budget=0.05), slim) == [("E331", "no configuration fits 5% of the FLOPs an image")]
    assert said(select(), two())[0][0] == "E320", "statistics of the whole width alone"
    ((code, title),) = said(select(widths=(0.25, 1.0)), slim)
    assert (code, title) == ("E331", "`norm` has no statistics for widths 25%")
    assert said(select(pref=(0.2, 0.3, 0.5)), slim)[0][0] == "E331"
    with pytest.raises(ValueError, match="pref sums up to 90%"):
        select(pref=(0.4, 0.5))
    with pytest.raises(ValueError, match="weights of tasks"):
        method(tasks=(0.0, 0.0))


@torch.no_grad()
def errors(model: TracedModel, data: Digits, configs: list[Widths]) -> dict[Widths, float]:
    """The share of answers of either task that are wrong, for each configuration."""
    net, batch = network(model), data.batch("heldout", range(data.size("heldout")))
    found = {}
    for widths in configs:
        answers, _ = run(model, net, widths, batch.ids)
        right = torch.stack([z.argmax(1) for z in answers], 1) == batch.labels
        found[widths] = 1 - float(right.double().mean())
    return found


WIDTHS = (0.25, 0.5, 1.0)


@cache
def taught(seed: int, ci_kd: float) -> tuple[TracedModel, Digits, dict[Widths, float]]:
    """A network of kind and parity trained at all widths, its data, and the share wrong at each width."""
    data = Digits(seed, 1000, 2000, parity=True)
    torch.manual_seed(seed)
    base = trace(learned(TwoTasks(16), data, 100, seed=seed), data.batch("train", range(2)).ids)
    chosen = method(
        steps=150, batch=64, widths=WIDTHS, random=1, ci_kd=ci_kd, precision="fp32", optimizer=AdamW(lr=3e-3)
    )
    model = as_traced(fit(chosen, base, Context(seed, {"data": data})).model)
    return model, data, errors(model, data, chosen.of(base))


@pytest.mark.claim
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_two_tasks_at_any_width(seed: int, measured: Measured) -> None:
    slim, data, wrong = taught(seed, 1.0)
    worse = sum(a <= b for a, b in pairwise([wrong[(w, w, w)] for w in WIDTHS]))
    name = "adaptive.slimmable"
    measured(name, "two tasks: steps in width at which a wider network is no better", worse, below=0.5)
    images = data.batch("heldout", range(100)).ids
    net, off, over = network(slim), 0, 0.0
    whole = sketched(slim, net, (1.0, 1.0, 1.0)).flops
    for budget in (0.2, 0.4, 0.6):
        picked = select(budget=budget, widths=WIDTHS)
        one = as_traced(edited(picked, slim))
        over = max(over, sum(layer_flops(one).values()) / whole - budget)
        with torch.no_grad():
            want, _ = run(slim, net, picked.chosen(slim), images)
            off += sum(not torch.equal(a, b) for a, b in zip(one(images), want, strict=True))
    measured("adaptive.select", "two tasks: answers cut out that differ in a bit", off, below=0.5)
    measured("adaptive.select", "two tasks: most that a budget is exceeded by", over, below=1e-9)


@pytest.mark.claim
@pytest.mark.xfail(
    raises=AssertionError,
    strict=False,
    reason="at a quarter answers are wrong 1.65 times as often on seed 2; 0.72 and 0.80 times on seeds 0, 1",
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_widths_that_hear_from_the_whole_err_less(seed: int, measured: Measured) -> None:
    for width in (0.25, 0.5):
        told, plain = (sum(e for c, e in taught(seed, w)[2].items() if c[0] == width) for w in (1.0, 0.0))
        words = (
            f"two tasks: answers wrong at an encoder of {100 * width:g}% with features compared, over without"
        )
        measured("adaptive.slimmable", words, told / plain, below=1.0)
