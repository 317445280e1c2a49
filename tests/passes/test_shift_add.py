"""Planes of signs times powers of two: the solver, the stored form, budgets, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from effc.compiler import planes
from effc.compiler.blocks.planes_linear import PlanesLinear
from effc.compiler.cost import count
from effc.compiler.exporter import inexpressible
from effc.compiler.method import Context
from effc.compiler.model import Model
from effc.compiler.op_graph import evaluate, expand
from effc.compiler.probe import difference
from effc.passes._moment import Moment
from effc.passes.adapt.full import Full
from effc.passes.quantize._solve import factor
from effc.passes.quantize.rtn import RTN
from effc.passes.reparam._planes import Form, as_stored, assign, fit, greedy, solve, stored
from effc.passes.reparam.dense import Dense
from effc.passes.reparam.shift_add import ShiftAdd
from effc.passes.tie.recursive import Recursive
from effc.runtime.smaller import smaller
from effc.runtime.stage import run_stage
from effc.specs.recipe import Ref

from .tiny_models import Sequences, blank, filled, on_meta, outputs

CODE, IDS = Ref("code"), torch.arange(36).view(3, 12)


def made(method: Any, model: Model) -> Model:
    return run_stage(method, [model], Context(data={"data": Sequences(model)})).model


def form(planes_: int = 3, down: int = 32, across: int = 1, scale: Any = "fp16", rounds: int = 50) -> Form:
    terms = {"fp16": 0, "pow2": 1, "apot2": 2}[scale]
    return Form(planes_, down, across, scale, terms, rounds)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("columns", [8, 13, 64])
def test_signs_survive_packing(columns: int) -> None:
    signs = torch.where(normal(3, 5, columns) < 0, -1, 1)
    packed = planes.pack_signs(signs)
    assert packed.shape == (3, 5, -(-columns // 8))
    assert torch.equal(planes.unpack_signs(packed, columns).long(), signs)


def test_powers_are_those_next_to_the_scale() -> None:
    a = torch.tensor([0.0, 0.25, 0.3, 0.36, 5.0, 100.0])
    assert planes.scale_values(stored(a, "pow2", 1).view(1, 1, 1, -1)).tolist() == [
        [[0, 0.25, 0.25, 0.5, 4, 128]]
    ]
    two = planes.scale_values(stored(a, "apot2", 2).view(1, 2, 1, -1)).flatten()
    assert two.tolist() == [0, 0.25, 0.3125, 0.375, 5.0, 96.0]
    three = planes.scale_values(stored(a, "apot2", 3).view(1, 3, 1, -1)).flatten()
    assert bool(((three - a).abs() <= (two - a).abs()).all())


def test_greedy_takes_the_mean_size_of_what_is_left() -> None:
    a, signs = greedy(torch.tensor([[3.0, -1.0, 0.0, 2.0]]), 2)
    assert a.tolist() == [[1.5, 1.0]]
    assert signs[0].tolist() == [[1, -1, 1, 1], [1, 1, -1, 1]]


def test_signs_are_those_of_the_nearest_sum() -> None:
    w, a = normal(6, 40), normal(6, 3, seed=1).abs()
    signs = assign(w, a)
    mine = (w - (a.unsqueeze(2) * signs).sum(1)).abs()
    patterns = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    best = (w.unsqueeze(2) - (a @ patterns.T).unsqueeze(1)).abs().amin(2)
    torch.testing.assert_close(mine, best)


def test_rounds_only_lower_the_error_and_half_precision_is_closest() -> None:
    """Of a normal sample: the errors that were measured for the source's algorithm, within a tenth."""
    w = normal(64, 128)
    errors: dict[tuple[str, int], float] = {}
    for scale, bits in (("fp16", 2), ("pow2", 2), ("fp16", 3), ("pow2", 3), ("apot2", 3), ("fp16", 4)):
        over = [
            (fit(w, form(bits, scale=scale, rounds=n))[1] / float(w.square().sum())) ** 0.5
            for n in (0, 2, 8, 50)
        ]
        assert all(b <= a + 1e-7 for a, b in pairwise(over)), (scale, bits)
        errors[scale, bits] = over[-1]
    for key, due in {("fp16", 2): 0.338, ("pow2", 2): 0.345, ("fp16", 3): 0.186, ("fp16", 4): 0.104}.items():
        assert errors[key] == pytest.approx(due, rel=0.1), key
    assert errors["fp16", 3] < errors["apot2", 3] < errors["pow2", 3] < errors["pow2", 2]


def correlated(n: int, width: int, seed: int) -> Tensor:
    mix = torch.linalg.qr(normal(width, width, seed=seed)).Q
    return (normal(n, width, seed=seed + 1) * torch.logspace(0, -1.5, width)) @ mix


@pytest.mark.parametrize(("down", "across"), [(64, 1), (16, 1), (1, 16), (8, 8)])
@pytest.mark.parametrize("order", [False, True])
def test_outputs_come_closer_than_weights_alone_bring_them(down: int, across: int, order: bool) -> None:
    w, x = normal(64, 64), correlated(500, 64, 3)
    moment = Moment(64)
    moment.add(x)
    c = moment.mean()
    turn = c.diagonal().argsort(descending=True) if order else None
    root = factor(c, 0.01, turn)
    assert root is not None
    lost = {}
    for bits in (2, 3):
        one = form(bits, down, across, "pow2", 20)
        for name, u in (("outputs", root[0]), ("weights", None)):
            signs, scales, rounded = solve(w, u, one, turn if u is not None else None)
            back = planes.dense(planes.pack_signs(signs), scales, 64)
            torch.testing.assert_close(back, rounded)
            lost[name, bits] = float(((w - rounded) @ x.T).norm() / (w @ x.T).norm())
        assert lost["outputs", bits] < lost["weights", bits]
    assert lost["outputs", 3] < lost["outputs", 2]


def test_scales_come_back_as_stored() -> None:
    a = normal(7, 3).abs()
    for scale in ("fp16", "pow2", "apot2"):
        kept = as_stored(a, form(scale=scale))
        assert torch.equal(as_stored(kept, form(scale=scale)), kept)
        assert float((kept / a - 1).abs().max()) < {"fp16": 1e-3, "pow2": 0.42, "apot2": 0.2}[scale]


@pytest.mark.parametrize("terms", [0, 1, 2])
def test_a_unit_computes_what_it_holds(terms: int) -> None:
    one: Any = PlanesLinear(
        in_features=13, out_features=12, planes=3, down=4, across=13, terms=terms, bias=True
    )
    for slot in ("signs", "scales"):
        setattr(one, slot, one.drawn(slot, torch.Generator().manual_seed(1)))
    one.bias = torch.nn.Parameter(normal(12))
    x = normal(2, 5, 13, seed=2)
    w, a = torch.zeros(12, 13), planes.scale_values(one.scales)
    signs = planes.unpack_signs(one.signs, 13).float()
    for p in range(3):
        for o in range(12):
            for i in range(13):
                w[o, i] += a[p, o // 3, i] * signs[p, o, i]
    torch.testing.assert_close(one.dense(), w)
    torch.testing.assert_close(one(x), F.linear(x, w, one.bias))
    model = filled(blank(layers=1))
    got, _ = evaluate(expand(one), one, x, model.step(torch.zeros(2, 5, dtype=torch.long)))
    torch.testing.assert_close(got, one(x))


@pytest.mark.parametrize(
    ("more", "each"),
    [
        ({"bits": 3}, lambda o, i: 3 * o * -(-i // 8) + 3 * i),
        ({"bits": 2, "group": 16}, lambda o, i: 2 * o * -(-i // 8) + 2 * i * o // 16),
        ({"bits": 2, "layout": "block8"}, lambda o, i: 2 * o * -(-i // 8) + 2 * 8 * i // 8),
        (
            {"bits": 4, "layout": "row", "group": 16, "scale": "fp16"},
            lambda o, i: o * i // 2 + 8 * o * i // 16,
        ),
        ({"layout": "row", "scale": "apot2", "terms": 3}, lambda o, i: 3 * o * -(-i // 8) + 9 * o),
    ],
)
def test_sizes_are_those_of_the_formula(more: Any, each: Any, tiny: Model) -> None:
    method = ShiftAdd.model_validate({"metric": "weight", "rounds": 1} | more)
    small, base = made(method, tiny), count(tiny)
    shapes = [tuple(tiny.module(p).weight.shape) for p in tiny.paths("mlp") + tiny.paths("attention")]
    dense = sum(o * i for o, i in shapes)
    assert count(small).params == base.params
    assert count(small).bytes == base.bytes - 4 * dense + sum(each(o, i) for o, i in shapes)
    assert count(small).flops_per_token == base.flops_per_token


def test_more_planes_are_closer_and_written_out_they_are_the_same(tiny: Model) -> None:
    exact = outputs(tiny, IDS)
    errors = []
    for bits in (1, 2, 3, 4):
        small = made(ShiftAdd(data=CODE, bits=bits, scale="fp16", rounds=10, layout="row", group=16), tiny)
        errors.append(difference(exact, outputs(small, IDS)))
        plain = made(Dense(), small)
        assert difference(outputs(small, IDS), outputs(plain, IDS)) < 1e-6
    assert errors == sorted(errors, reverse=True)
    assert any("PlanesLinear" in word for word in inexpressible_words(small))


def inexpressible_words(model: Model) -> list[str]:
    anonymous = Model(model.gm)
    assert inexpressible(anonymous)
    return [type(unit).__name__ for _, unit in anonymous.units()]


def test_a_budget_gives_bits_to_what_suffers_most(tiny: Model) -> None:
    loud: Any = tiny.module("layers.3.mlp.down")
    loud.weight = torch.nn.Parameter(loud.weight.detach() * normal(32, 48).exp() * 4, requires_grad=False)
    method = ShiftAdd(data=CODE, choices=(2, 3), budget=2.7, rounds=3)
    small = made(method, tiny)
    units = {path: unit for path, unit in small.units() if isinstance(unit, PlanesLinear)}
    assert {u.planes for u in units.values()} == {2, 3}
    assert units["layers.3.mlp.down"].planes == 3
    stored_ = sum(8 * (u.signs.numel() + u.scales.nbytes) for u in units.values())
    weights = sum(u.in_features * u.out_features for u in units.values())
    assert 2.55 < stored_ / weights <= 2.7
    quiet = made(method.model_copy(update={"mlp_weight": 1e-6}), tiny)
    two: Any = quiet.module("layers.3.mlp.down")
    assert two.planes == 2


def test_a_small_copy_is_sound(tiny: Model) -> None:
    anonymous = Model(made(ShiftAdd(metric="weight", rounds=1, bits=2, layout="row", group=16), tiny).gm)
    copy = smaller(anonymous).materialize()
    assert bool(outputs(copy, IDS).isfinite().all())


def said(method: Any, model: Model) -> tuple[str, str]:
    first = method.refuses(on_meta(model), ())[0]
    return first.code, first.render()


def test_what_cannot_be_written_so_is_refused(tiny: Model) -> None:
    plain: Any = {"metric": "weight"}
    code, words = said(ShiftAdd(**plain, group=5), tiny)
    assert (code, "use 4, 2, 8 or all" in words or "or all" in words) == ("E321", True)
    odd = filled(blank())
    wide: Any = type(odd.module("layers.1.mlp.up"))(in_features=30, out_features=48)
    odd.module("layers.1.mlp").up = wide
    assert "8 columns" in said(ShiftAdd(**plain, layout="block8"), odd)[1]
    assert said(ShiftAdd(**plain, select=("head",)), tiny)[0] == "E341"
    assert said(ShiftAdd(**plain), made(Recursive(loops=2), tiny))[0] == "E341"
    assert said(ShiftAdd(**plain), made(RTN(bits=8), tiny))[0] == "E322"
    assert said(ShiftAdd(**plain), filled(blank(layers=2, experts=4)))[0] == "E323"
    small = made(ShiftAdd(**plain, rounds=0), tiny)
    assert said(RTN(), small)[0] == "E322"
    assert said(Full(data=CODE, steps=1), small)[0] == "E323"
    code, words = said(ShiftAdd(data=CODE, choices=(2, 3), budget=2.1), tiny)
    assert (code, "raise the budget to 2." in words) == ("E325", True)
    for wrong in (
        {"bits": 5}, {"bits": 0}, {"data": None}, {"terms": 2}, {"scale": "apot2"}, {"budget": 2.5},
        {"choices": (2, 3)}, {"choices": (2, 9), "budget": 3}, {"layout": "block8", "group": 4},
        {"data": CODE, "metric": "weight"},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="validation error"):
            ShiftAdd.model_validate({"data": CODE} | wrong)
