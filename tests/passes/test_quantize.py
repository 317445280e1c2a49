"""Quantizers against plain float64 references, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from effc.compiler.blocks import Linear, QuantEmbedding, QuantLinear
from effc.compiler.cost import count
from effc.compiler.method import Context
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Rewrite
from effc.passes._moment import Moment
from effc.passes.quantize import _pieces
from effc.passes.quantize._grid import decode, encode, fit, fit_least_squares
from effc.passes.quantize._solve import factor, output_error, solve
from effc.passes.quantize.gptq import GPTQ
from effc.passes.quantize.rtn import RTN
from effc.runtime.calibrate import calibrate
from effc.runtime.peak import Peak, resident
from effc.specs.diagnostic import EffcError
from effc.specs.recipe import Ref

from .tiny_models import Sequences, blank, filled, on_meta, outputs

CODE = Ref("code")


def gauss(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def decaying(rows: int, inputs: int, seed: int = 1) -> Tensor:
    """Inputs whose covariance has a quickly falling spectrum."""
    turn = torch.linalg.qr(gauss(inputs, inputs, seed + 1)).Q
    return (gauss(rows, inputs, seed) * torch.arange(1, inputs + 1) ** -1.0) @ turn


def rewritten(method: Rewrite, model: Model) -> Model:
    rw = Rewriter(model, method.kind)
    method.rewrite(rw)
    return rw.done()


def rounded(w: Tensor, bits: int, groups: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """w' and s [R, G] by the formulas, in float64 with scales rounded to half precision."""
    wide = w.double().view(w.shape[0], groups, -1)
    if symmetric:
        top = 2 ** (bits - 1) - 1
        s = (wide.abs().amax(-1, keepdim=True).float() / top).half().double()
        return (s * (wide / s).round().clamp(-top - 1, top)).view_as(w), s
    high, low = wide.amax(-1, keepdim=True).clamp(min=0), wide.amin(-1, keepdim=True).clamp(max=0)
    s = ((high - low).float() / (2**bits - 1)).half().double()
    z = (-low / s).round().clamp(0, 2**bits - 1)
    return (s * (((wide / s).round() + z).clamp(0, 2**bits - 1) - z)).view_as(w), s


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rtn_is_its_formula(bits: int, groups: int, symmetric: bool) -> None:
    w = gauss(16, 32)
    scale, zero = fit(w.view(16, groups, -1), bits, symmetric, torch.float16)
    mine = decode(encode(w.view(16, groups, -1), scale, zero, bits), scale, zero).view_as(w)
    expected, s = rounded(w, bits, groups, symmetric)
    assert torch.allclose(mine.double(), expected, atol=1e-6)
    gap = (mine.double() - w).abs().view(16, groups, -1)
    top = s * (2 ** (bits - 1) - 0.5) if symmetric else None
    inside = (
        w.double().view(16, groups, -1) <= top if top is not None else torch.ones_like(gap, dtype=torch.bool)
    )
    assert bool((gap <= s / 2 * 1.01 + 1e-9)[inside].float().mean() > 0.97)
    assert bool((gap <= s * 1.01).all())


@pytest.mark.parametrize(
    ("bits", "errors"),
    [(2, (0.843, 0.587, 0.718, 0.457)), (3, (0.316, 0.253, 0.251, 0.195)), (4, (0.135, 0.118, 0.108, 0.091))],
)
def test_rtn_errors_are_the_known_ones(bits: int, errors: tuple[float, ...]) -> None:
    """Relative errors on a Gaussian 512 x 512: symmetric and not, a row or 64 inputs a scale."""
    w = gauss(512, 512)
    cases = [(1, True), (1, False), (8, True), (8, False)]
    for (groups, symmetric), known in zip(cases, errors, strict=True):
        wide = w.view(512, groups, -1)
        scale, zero = fit(wide, bits, symmetric, torch.float16)
        error = float((decode(encode(wide, scale, zero, bits), scale, zero) - wide).norm() / w.norm())
        assert error == pytest.approx(known, rel=0.1)


def test_least_squares_clipping_is_never_worse() -> None:
    w = gauss(8, 64).view(8, 4, 16)
    for symmetric in (True, False):
        plain, clipped = (
            fit(w, 3, symmetric, torch.float16),
            fit_least_squares(w, 3, symmetric, torch.float16),
        )
        errors = [(decode(encode(w, *grid, 3), *grid) - w).square().sum(-1) for grid in (plain, clipped)]
        assert bool((errors[1] <= errors[0]).all())
        assert float(errors[1].sum()) < 0.95 * float(errors[0].sum())


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_stays_zero_and_nothing_becomes_nan(symmetric: bool) -> None:
    w = gauss(4, 16)
    w[:, ::2] = 0
    w[0] = 0
    w[1] = 1e-9
    wide = w.view(4, 2, 8)
    scale, zero = fit(wide, 4, symmetric, torch.float16)
    back = decode(encode(wide, scale, zero, 4), scale, zero)
    assert bool(torch.isfinite(back).all())
    assert bool((back[wide == 0] == 0).all())
    assert bool((scale[0] == 1).all())


def test_a_tied_table_is_stored_once_and_looked_up_by_row(tiny: Model) -> None:
    small = rewritten(RTN(bits=8, rules=({"on": "head", "bits": 6},)), tiny)  # type: ignore[arg-type]
    assert isinstance(small.module("embedding"), QuantEmbedding)
    assert isinstance(small.module("head"), QuantLinear)
    assert small.ties() == {"head.packed": "embedding.packed", "head.scales": "embedding.scales"}
    table = 48 * 32 * 6 // 8 + 2 * 48
    linears = [m for p in small.paths("attention") + small.paths("mlp") if (m := small.module(p))]
    packed = sum(m.cost().bytes for m in linears)
    norms = 4 * 32 * 13
    assert count(small).bytes == table + packed + norms
    assert count(small).params == count(tiny).params


def test_norms_embedding_and_router_are_left_alone(mixture: Model) -> None:
    small = rewritten(RTN(bits=4, group=16), mixture)
    assert small.module("embedding").dtype == "float32"
    assert isinstance(small.module("layers.0.moe.router"), Linear)
    assert type(small.module("layers.0.moe.experts.up")).__name__ == "QuantStackedLinear"
    ids = torch.arange(12).view(1, 12)
    rows = outputs(rewritten(RTN(bits=8), mixture), ids) - outputs(mixture, ids)
    assert float(rows.abs().max()) < 0.2 * float(outputs(mixture, ids).abs().max())


def test_bfloat16_models_stay_bfloat16() -> None:
    model = filled(blank(layers=2, dtype="bfloat16"))
    small = rewritten(RTN(bits=8, scale="bf16"), model)
    assert outputs(small, torch.arange(8)[None]).dtype == torch.bfloat16
    assert small.module("layers.0.mlp.up").scales.dtype == torch.bfloat16


def naive(w: Tensor, h: Tensor, bits: int, group: int, symmetric: bool, damp: float) -> Tensor:
    """GPTQ column by column in float64, each update applied at once."""
    w = w.double().clone()
    h = h.double() + torch.eye(h.shape[0]) * damp * h.double().diagonal().mean()
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    out = torch.empty_like(w)
    scale = zero = torch.empty(0)
    for j in range(w.shape[1]):
        if j % group == 0:
            scale, zero = fit(w[:, j : j + group].float().unsqueeze(1), bits, symmetric, torch.float16)
        column = w[:, j : j + 1].float()
        out[:, j] = decode(encode(column, scale[:, 0], zero[:, 0], bits), scale[:, 0], zero[:, 0])[
            :, 0
        ].double()
        error = (w[:, j] - out[:, j]) / u[j, j]
        w[:, j:] -= error[:, None] * u[j, j:]
    return out


def test_a_moment_of_half_precision_inputs_loses_nothing() -> None:
    x = gauss(300, 64).bfloat16()
    moment = Moment(64)
    for part in x.split(100):
        moment.add(part)
    exact = x.double().T @ x.double() / 300
    assert float((moment.mean() - exact).abs().max()) < 1e-6 * float(exact.abs().max())


@pytest.mark.parametrize("symmetric", [True, False])
def test_ranges_of_least_error_leave_less_of_it_in_outputs(symmetric: bool) -> None:
    w, x = gauss(64, 256), gauss(2000, 256)
    c = x.T @ x / len(x)
    found = factor(c, 0.01)
    assert found is not None
    lost = []
    for find in (fit, fit_least_squares):
        q, scale, zero = solve(w, found[0], 3, 64, symmetric, torch.float16, 128, None, find)
        lost.append(output_error(w, decode(q.view(64, 4, 64), scale, zero).view_as(w), c))
    assert lost[1] < 0.97 * lost[0]


@pytest.mark.parametrize(("group", "block"), [(32, 128), (8, 16), (16, 8), (12, 10), (96, 40)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_equals_the_naive_solver(group: int, block: int, symmetric: bool) -> None:
    w, x = gauss(12, 96), decaying(400, 96)
    moment = Moment(96)
    moment.add(x)
    h = 2 * moment.mean()
    found = factor(h, 0.01)
    assert found is not None
    q, scale, zero = solve(w, found[0], 3, group, symmetric, torch.float16, block, None, fit)
    mine = decode(q.view(12, 96 // group, -1), scale, zero).view_as(w)
    expected = naive(w, h, 3, group, symmetric, 0.01)
    same = torch.isclose(mine.double(), expected, rtol=2e-3, atol=0)  # a scale may differ in its last bit
    assert float((~same).double().mean()) < 0.02  # a tie may fall to the other side
    assert output_error(w, mine, h) == pytest.approx(output_error(w, expected.float(), h), rel=0.02)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_halves_the_output_error_of_rounding(bits: int) -> None:
    w, x = gauss(128, 256), decaying(2000, 256)
    moment = Moment(256)
    moment.add(x[:700])
    moment.add(x[700:])
    h = 2 * moment.mean()
    assert torch.allclose(h, 2 * x.T @ x / 2000, atol=1e-6)
    u, damp = factor(h, 0.01) or (h, 0.0)
    assert damp == 0.01
    for order in (None, h.diagonal().argsort(descending=True)):
        turned = u if order is None else (factor(h, 0.01, order) or (h, 0.0))[0]
        q, scale, zero = solve(w, turned, bits, 256, False, torch.float16, 128, order, fit)
        solved = decode(q.unsqueeze(1), scale, zero).view_as(w)
        grid = fit(w.unsqueeze(1), bits, False, torch.float16)
        plain = decode(encode(w.unsqueeze(1), *grid, bits), *grid).view_as(w)
        assert output_error(w, solved, h) < 0.5 * output_error(w, plain, h)
        direct = float(((w - solved) @ x.T).norm() / (w @ x.T).norm())
        assert output_error(w, solved, h) == pytest.approx(direct, rel=1e-3)


def test_damping_grows_until_the_statistics_can_be_inverted() -> None:
    flat = torch.zeros(64, 64)
    flat[:4, :4] = torch.eye(4) * 1e6
    flat += torch.diag((flat.diagonal() == 0).float() * 1e-6)
    flat[5, 6] = flat[6, 5] = 500.0
    found = factor(flat, 1e-4)
    assert found is not None
    assert found[1] > 1e-4
    assert factor(torch.full((4, 4), math.nan), 0.01) is None


def test_factoring_takes_the_memory_of_one_matrix() -> None:
    c = torch.eye(2048) + 0.5
    factor(torch.eye(64), 0.01)  # what LAPACK sets up once
    before = resident()
    with Peak() as peak:
        found = factor(c, 0.01)
    assert found is not None
    assert peak.bytes - before < 1.5 * c.nbytes
    h = 2 * c + 0.01 * 3 * torch.eye(2048)
    x = torch.ones(2048) / 2048
    assert torch.allclose(found[0] @ (h @ (found[0].T @ x)), x, atol=1e-3)


def test_rows_are_solved_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    model = filled(blank(layers=1))
    runs = []
    for together in (_pieces.TOGETHER, 300):
        monkeypatch.setattr(_pieces, "TOGETHER", together)
        method = GPTQ(data=CODE, bits=4, group=16)
        runs.append(calibrate(method, model, Context(data={"data": Sequences(model)})))
    whole, strips = (run.model.tensors() for run in runs)
    assert whole.keys() == strips.keys()
    same = [float((whole[name] == strips[name]).float().mean()) for name in whole]
    assert min(same) > 0.98  # a sum in another order may tip a tie
    errors = [run.measures["errors"] for run in runs]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


def test_inputs_that_never_fire_lose_their_weights() -> None:
    model = filled(blank(layers=1))
    up = model.module("layers.0.norm2")
    up.weight.data[5] = 0
    outcome = calibrate(GPTQ(data=CODE, bits=4), model, Context(data={"data": Sequences(model)}))
    assert bool((outcome.model.module("layers.0.mlp.up").dense()[:, 5] == 0).all())


def test_gptq_is_closer_than_rtn_end_to_end(tiny: Model, mixture: Model) -> None:
    for model in (tiny, mixture):
        data = Sequences(model, count=48)
        exact = outputs(model, data.ids)
        solved = calibrate(GPTQ(data=CODE, bits=3, group=16), model, Context(data={"data": data}))
        plain = rewritten(RTN(bits=3, group=16), model)
        errors = [float((outputs(m, data.ids) - exact).norm()) for m in (solved.model, plain)]
        assert errors[0] < 0.95 * errors[1]
        assert count(solved.model) == count(plain)
        assert set(solved.measures["errors"]) == set(GPTQ(data=CODE).targets(model))


def words(method: RTN | GPTQ, model: Model) -> str:
    return "\n".join(d.render() for d in method.refuses(model, ()))


def test_a_group_that_does_not_divide_is_refused_with_those_that_do(tiny: Model) -> None:
    said = words(RTN(group=20), on_meta(tiny))
    assert "error[E321]: group 20 does not divide in_features 32 of layers.0.attention.q and" in said
    assert "help: use 4, 8, 16 or channel" in said
    assert "nor 48 of layers.0.mlp.down and 5 more" in said


def test_packed_and_factored_weights_are_refused(tiny: Model) -> None:
    small = rewritten(RTN(bits=4, group=16), tiny)
    assert "E322" in words(RTN(bits=8), small)
    assert "quantize before the stage that packs" in words(GPTQ(data=CODE), small)
    assert words(RTN(bits=8, select=("head",)), small) == ""


def test_numbers_that_are_not_finite_are_named(tiny: Model) -> None:
    tiny.module("layers.2.mlp.up").weight.data[1, 2] = math.nan
    with pytest.raises(EffcError, match=r"E420.*weight of layers.2.mlp.up is not finite"):
        rewritten(RTN(bits=4), tiny)
    with pytest.raises(EffcError, match=r"E420.*weight of layers.2.mlp.up is not finite"):
        calibrate(GPTQ(data=CODE, bits=4), tiny, Context(data={"data": Sequences(tiny)}))


@pytest.mark.parametrize(
    "wrong", [{"bits": 1}, {"bits": 9}, {"group": 0}, {"group": "row"}, {"scheme": "middle"}]
)
def test_arguments_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        RTN.model_validate(wrong)


def test_a_rule_may_set_only_what_rules_may(tiny: Model) -> None:
    with pytest.raises(EffcError, match="E211"):
        RTN(rules=({"on": "head", "select": "x"},)).targets(tiny)  # type: ignore[arg-type]
    with pytest.raises(EffcError, match="E212"):
        RTN(rules=({"on": "head", "bits": 11},)).targets(tiny)  # type: ignore[arg-type]
