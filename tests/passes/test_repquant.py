"""Coded inputs: one grid for a layer out of one for each channel, curves of probabilities, whole models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from effc.compiler import graph_json
from effc.compiler.blocks import Attention, CodedAttention, CodedLinear, Linear
from effc.compiler.blocks.coded_attention import on_curve
from effc.compiler.blocks.coded_linear import codes, on_grid
from effc.compiler.cost import count
from effc.compiler.facts import facts_of
from effc.compiler.isolation import isolation
from effc.compiler.method import Batch, Context
from effc.compiler.model import Model, roles_of
from effc.compiler.op_graph import evaluate, expand
from effc.compiler.probe import difference, widened
from effc.compiler.readers import readers
from effc.compiler.rewrite import Rewriter
from effc.compiler.step import Cache
from effc.passes.arch.gated_attention import GatedAttentionSwap
from effc.passes.quantize._one_grid import into_norm, into_readers, one_grid
from effc.passes.quantize._ranges import Range, cut, grid, learned
from effc.passes.quantize._rebuild import rebuilt, to_nearest
from effc.passes.quantize._seen import Even, Rows
from effc.passes.quantize.repquant import RepQuant
from effc.passes.quantize.rtn import RTN
from effc.runtime.generate import generate
from effc.runtime.stage import run_stage
from effc.specs.recipe import Ref
from tests.compiler.conftest import FAMILIES, fill, inputs

from .tiny_models import on_meta

CODE = Ref("code")
SHIFTED = ("gpt2", "neox", "vit")
"""Families whose norms have a bias."""
PLAIN = ("llama", "qwen3", "gemma2")


class Seen:
    """Data in memory of whatever a model reads: ids or images [N, ...]."""

    fingerprint = vocabulary = "seen"
    bytes_per_token = 1.0

    def __init__(self, model: Model, rows: int = 12) -> None:
        self.model, self.x = model, inputs(model, rows, 9, seed=5)

    def size(self, split: str) -> int:
        return len(self.x)

    def tokens(self, split: str) -> int:
        return len(self.x)

    def batch(self, split: str, indices: Sequence[int]) -> Batch:
        x = self.x[list(indices)]
        return Batch(x, torch.zeros(len(x), 1, dtype=torch.int64), self.model.step(x))


def method(**given: Any) -> RepQuant:
    return RepQuant.model_validate({"data": CODE, "samples": 12, "steps": 3} | given)


def made(model: Model, **given: Any) -> Model:
    return run_stage(method(**given), [model], Context(data={"data": Seen(model)})).model


def family(name: str) -> Model:
    """Random weights; channels of norms differ by a factor of up to 60, and sit off zero where they can."""
    model = fill(FAMILIES[name]())
    dice = torch.Generator().manual_seed(9)
    for path in model.paths("norm"):
        norm: Any = model.module(path)
        width = norm.weight.shape[0]
        gain = torch.exp(torch.randn(width, generator=dice))
        model.place(f"{path}.weight", gain - norm.offset)
        if norm.bias is not None:
            model.place(f"{path}.bias", 2 * torch.randn(width, generator=dice))
    return model


def outputs(model: Model, path: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the module at a path gives [n, d], and what the model gives."""
    held: list[Tensor] = []
    handle = model.module(path).register_forward_hook(lambda m, a, y: held.append(y.flatten(0, -2)))
    with torch.no_grad():
        whole = model(x)
    handle.remove()
    return held[0], whole


@pytest.mark.parametrize("name", [*SHIFTED, *PLAIN])
@pytest.mark.parametrize("bits", [4, 8])
def test_one_grid_gives_the_codes_of_all_and_the_model_stays(name: str, bits: int) -> None:
    """CHECK: codes are equal before and after the fold, in float64 all of them; nothing else moves."""
    for dtype, least, far in ((torch.float64, 1.0, 1e-12), (torch.float32, 0.999, 1e-5)):
        model = widened(family(name), dtype)
        x = inputs(model, 4)
        x = x.to(dtype) if x.is_floating_point() else x
        for path in ("layers.0.norm1", "layers.1.norm2"):
            y, before = outputs(model, path, x)
            symmetric = name in PLAIN
            scale, zero = grid(Range(y.amin(0), y.amax(0)), bits, symmetric)
            one = one_grid(scale, zero, bits, symmetric)
            rw = Rewriter(model)
            into_readers(rw, readers(model, path).units, one)
            into_norm(rw, path, one)
            turned, after = outputs(rw.done(), path, x)
            assert difference(before, after) < far
            own = codes(y, scale, zero, bits)
            assert float((codes(turned, one.scale, one.zero, bits) == own).float().mean()) >= least
            assert (own.amax() - own.amin()) > 1 << (bits - 1), "the grid is in use"
            # what the codes stand for is the same number, read through the turned weights
            back = on_grid(turned, one.scale, one.zero, bits) * one.ratio
            back = back if one.shift is None else back - one.shift
            torch.testing.assert_close(back.to(dtype), on_grid(y, scale, zero, bits), rtol=1e-4, atol=1e-4)


def loud(rows: int = 512, width: int = 64) -> tuple[Tensor, Tensor]:
    """Outputs of a norm with a channel fifty times as large as others, off zero, and a weight [48, width]."""
    dice = torch.Generator().manual_seed(2)
    x = torch.randn(rows, width, generator=dice) + torch.randn(width, generator=dice)
    x[:, 7] *= 50
    w = torch.randn(48, width, generator=dice)
    w[:, 7] /= 50
    return x, w


@pytest.mark.parametrize("bits", [4, 8])
def test_a_loud_channel_costs_what_it_costs_alone(bits: int) -> None:
    x, w = loud()
    own = Range(x.amin(0), x.amax(0))
    scale, zero = grid(own, bits, False)
    one = one_grid(scale, zero, bits, False)
    y = one.turned(x)
    assert one.shift is not None
    moved = (w.double() * one.ratio).float()
    bias = -(w.double() @ one.shift).float()

    def error(coded: Tensor, weight: Tensor, add: Tensor | float = 0.0) -> float:
        return float((coded @ weight.T + add - x @ w.T).norm() / (x @ w.T).norm())

    channels = error(on_grid(x, scale, zero, bits), w)
    layer = grid(Range(x.amin().reshape(1), x.amax().reshape(1)), bits, False)
    together = error(on_grid(x, *layer, bits), w)
    assert error(on_grid(y, one.scale, one.zero, bits), moved, bias) == pytest.approx(channels, rel=1e-2)
    assert channels < together / 3


def test_a_channel_that_never_moves_keeps_its_gain_finite() -> None:
    x, _ = loud()
    x[:, 3], x[:, 4] = 0.0, 5.0
    scale, zero = grid(Range(x.amin(0), x.amax(0)), 4, False)
    one = one_grid(scale, zero, 4, False)
    assert bool(torch.isfinite(one.turned(x)).all())
    assert float(one.ratio.min()) >= 0.9e-3
    assert torch.equal(codes(one.turned(x), one.scale, one.zero, 4), codes(x, scale, zero, 4))
    nothing = grid(Range(torch.zeros(3), torch.zeros(3)), 4, False)[0]
    assert torch.equal(nothing, torch.ones(3))


@pytest.mark.parametrize(("bits", "curve"), [(3, "log2"), (4, "log2"), (3, "log_sqrt2"), (4, "log_sqrt2")])
def test_probabilities_lie_on_powers(bits: int, curve: Any) -> None:
    p = torch.softmax(4 * torch.randn(64, 32, generator=torch.Generator().manual_seed(0)), -1)
    size, root = torch.tensor([0.9]), 2.0 if curve == "log2" else math.sqrt(2)
    points = torch.tensor([0.9 * root**-n for n in range(1 << bits)] + [0.0])
    got = on_curve(p, size, curve, bits)
    assert float((got.unsqueeze(-1) - points).abs().amin(-1).max()) < 1e-6
    inside = (p > points[-2] * 1.01) & (p < 0.9)
    assert float((got[inside] / p[inside]).log().abs().max()) <= math.log(root) / 2 + 1e-4
    assert bool((got[p < points[-2] / root**0.51] == 0).all())
    assert float(on_curve(torch.zeros(1), size, curve, bits)) == 0


def test_finer_powers_hold_probabilities_better() -> None:
    p = torch.softmax(2 * torch.randn(256, 64, generator=torch.Generator().manual_seed(0)), -1)
    curves: tuple[Any, ...] = ("log_sqrt2", "log2", "uniform")
    errors = [float((on_curve(p, p.max(), c, 4) - p).norm() / p.norm()) for c in curves]
    assert errors[0] < 0.6 * min(errors[1:])


def test_a_learned_range_is_never_worse_and_rebuilt_weights_make_up_for_inputs() -> None:
    x, w = loud()
    x = x * torch.exp(0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3)))
    whole, gram = Range(x.amin(0), x.amax(0)), w.T @ w

    def lost(span: Range) -> float:
        return float(((on_grid(x, *grid(span, 4, False), 4) - x) @ w.T).norm() / (x @ w.T).norm())

    assert lost(learned(x, gram, whole, 4, False, 30, 0.1)) < 0.9 * lost(whole)
    assert lost(learned(x, gram, whole, 4, False, 1, 0.1)) <= lost(whole)
    assert lost(cut(x, whole, 4, False)) <= lost(whole) * 1.05
    mixed = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(4))).Q
    x = (
        torch.randn(512, 64, generator=torch.Generator().manual_seed(5)) * torch.logspace(0, -1.5, 64)
    ) @ mixed
    coded = on_grid(x, *grid(Range(x.amin(0), x.amax(0)), 4, False), 4)
    plain, fitted = to_nearest(w, x, coded, 4), rebuilt(w, x, coded, 4, 0.01)
    assert fitted.error < 0.85 * plain.error
    assert rebuilt(w, x, x, 4, 0.01).error < 0.7 * to_nearest(w, x, x, 4).error
    few = rebuilt(w, x[:2], coded[:2], 4, 0.01)
    assert torch.equal(few.q, to_nearest(w, x[:2], coded[:2], 4).q), "two rows fit nothing"


def test_a_sample_is_even_and_ranges_are_of_all() -> None:
    even = Even(10)
    for part in torch.arange(107.0).split(7):
        even.add(part)
    kept = even.whole()
    assert torch.equal(kept, torch.arange(0.0, 107, even.every))
    assert 5 <= len(kept) <= 10
    rows = Rows(2)
    rows.add(torch.tensor([[1.0, -3.0], [2.0, 4.0]]))
    rows.add(torch.tensor([[-1.0, 0.0]]))
    assert (rows.low.tolist(), rows.high.tolist()) == ([-1.0, -3.0], [2.0, 4.0])


@pytest.mark.parametrize("name", ["gpt2", "neox", "vit", "llama", "gemma2"])
def test_a_model_of_codes_is_planned_saved_and_close_at_eight_bits(name: str) -> None:
    model = family(name)
    x = Seen(model).x
    small = made(model, weight_bits=8, act_bits=8, softmax="uniform")
    with torch.no_grad():
        whole, got = model(x), small(x)
    assert float((got - whole).norm() / whole.norm()) < (0.05 if name in SHIFTED else 0.25)
    kinds = {path: type(small.module(path)) for path in small.roles}
    assert kinds["layers.0.attention"] is CodedAttention
    assert kinds["layers.1.mlp.down"] is kinds["layers.1.attention.q"] is CodedLinear
    rw = Rewriter(on_meta(model), "quantize.repquant")
    method(weight_bits=8, act_bits=8).outline(rw, ())
    assert count(rw.done(), 8) == count(small, 8)
    assert small.roles == roles_of(small.gm)
    assert facts_of(small)["packed"] is False, "tables and heads stay dense"
    back = graph_json.from_json(graph_json.to_json(small))
    for key, tensor in small.tensors().items():
        back.place(key, tensor.detach())
    with torch.no_grad():
        assert torch.equal(back(x), got)
    inner: Any = small.module("layers.0.attention.q")
    scales = [small.module(f"layers.0.attention.{n}").input_scale for n in ("q", "k", "v")]
    assert torch.equal(scales[0], scales[1])
    assert torch.equal(scales[0], scales[2])
    assert (int(inner.input_zero) == 0) == (name in PLAIN)


def test_norms_without_a_bias_take_symmetric_grids_and_get_none() -> None:
    small = made(family("llama"))
    assert all(small.module(p).bias is None for p in small.paths("norm"))
    assert small.module("layers.0.attention.q").bias is None
    shifted = made(family("gpt2"), scheme="symmetric")
    assert int(shifted.module("layers.0.mlp.up").input_zero) == 0


def test_readers_that_are_left_out_take_up_the_scales_all_the_same() -> None:
    model = family("gpt2")
    x = Seen(model).x
    only = made(model, weight_bits=8, act_bits=8, select=("attention.q", "attention.k"), reconstruct=False)
    assert type(only.module("layers.0.attention.v")) is Linear
    assert type(only.module("layers.0.attention")) is Attention, "its values are not coded"
    assert not torch.equal(
        only.module("layers.0.attention.v").weight, model.module("layers.0.attention.v").weight
    )
    with torch.no_grad():
        assert float((only(x) - model(x)).norm() / model(x).norm()) < 0.05


def test_fewer_bits_of_inputs_cost_more_and_one_grid_found_for_all_most() -> None:
    model = family("gpt2")
    x = Seen(model).x
    with torch.no_grad():
        whole = model(x)

        def apart(**given: Any) -> float:
            return float((made(model, weight_bits=8, **given)(x) - whole).norm() / whole.norm())

        fine, coarse = apart(act_bits=8), apart(act_bits=4)
        naive = apart(act_bits=4, ln="layer", clip="minmax", softmax="uniform", reconstruct=False)
    assert fine < coarse < naive


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_expansion_equals_forward_and_the_cache_is_a_value(name: str) -> None:
    small = made(family(name))
    block: Any = small.module("layers.1.attention")
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    ids = inputs(small, 2, 9)
    want = block(x, small.step(ids))
    got, _ = evaluate(expand(block), block, x, small.step(ids))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    cache, past = Cache(9), None
    for start, end in ((0, 5), (5, 6), (6, 9)):
        step = small.step(ids[:, start:end], None, cache)
        y, past = evaluate(expand(block), block, x[:, start:end], step, past)
        torch.testing.assert_close(y, block(x[:, start:end], step), rtol=1e-5, atol=1e-5)
        cache.filled = end
        torch.testing.assert_close(y, want[:, start:end], rtol=1e-4, atol=1e-4)
    assert generate(small, ids[:1], max_new_tokens=3).shape == (1, 12)


def test_static_grids_let_no_row_see_another() -> None:
    assert isolation(made(family("gpt2"))).isolated
    assert isolation(made(family("vit"))).isolated


def test_rules_give_layers_widths_of_their_own() -> None:
    rules = [{"on": "layers[0]", "weight_bits": 8, "act_bits": 8}, {"on": "mlp.down", "skip": True}]
    small = made(family("gpt2"), rules=rules)
    first: Any = small.module("layers.0.mlp.up")
    last: Any = small.module("layers.1.mlp.up")
    assert (first.bits, first.input_bits, last.bits, last.input_bits) == (8, 8, 4, 4)
    assert type(small.module("layers.0.mlp.down")) is Linear
    assert (small.module("layers.0.attention").bits, small.module("layers.1.attention").bits) == (8, 4)


def told(name: str | Model, **given: Any) -> list[tuple[str, str | None]]:
    model = family(name) if isinstance(name, str) else name
    return [(d.code, d.about) for d in method(**given).refuses(model)]


def test_what_cannot_be_is_refused_before_any_work() -> None:
    assert told("gpt2") == told("vit") == told("llama") == []
    assert told("bert") == [("E320", "ln")]
    (problem,) = method().refuses(family("bert"))
    assert "the residual stream" in problem.notes[0]
    assert "ln = layer" in str(problem.help)
    assert told("bert", ln="layer") == []
    assert ("E320", "select") in told("mixtral")
    assert told("llama", scheme="asymmetric") == [("E325", "scheme")]
    assert told("gpt2", scheme="asymmetric") == []
    assert told("vit", select=("embedding.patch", "attention")) == [("E320", "select")]
    assert told("llama", select=("head",)) == [("E341", "select")], "the table is the head"
    assert told("gpt2", rules=[{"on": "attention.q", "act_bits": 8}]) == [("E325", "rules")]
    packed = Rewriter(family("gpt2"))
    RTN(bits=8, select=("mlp",)).rewrite(packed)
    assert told(packed.done())[0][0] == "E322"
    assert told(packed.done(), select=("attention",)) == []
    gated = Rewriter(family("gpt2"))
    GatedAttentionSwap().rewrite(gated)
    assert ("E320", "softmax") in told(gated.done(), select=("attention.q", "attention.k", "attention.v"))
    with pytest.raises(ValueError, match="validation error"):
        method(act_bits=1)
    with pytest.raises(ValueError, match="coded attention has 2 to 8"):
        CodedAttention(width=8, heads=2, kv_heads=2, head_dim=4, bits=9)


def test_what_is_coded_is_not_rounded_again() -> None:
    (problem,) = method().refuses(made(family("llama")))
    assert problem.code == "E322"
