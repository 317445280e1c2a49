"""Linear attention in place of softmax attention: what is taken over, what it costs, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from effc.compiler.blocks import Attention
from effc.compiler.blocks.gated_linear_attention import GatedLinearAttention
from effc.compiler.blocks.liger_attention import LigerAttention
from effc.compiler.cost import cache_bytes, count
from effc.compiler.method import Context
from effc.compiler.model import Model
from effc.compiler.probe import difference
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Rewrite
from effc.compiler.step import Cache
from effc.passes.adapt.fold import Fold
from effc.passes.adapt.lora import Lora
from effc.passes.linearize.gla import GLA
from effc.passes.linearize.liger import Liger
from effc.passes.lower.decoder import lower
from effc.passes.quantize.rtn import RTN
from effc.runtime.fit import fit
from effc.runtime.generate import generate
from effc.runtime.kernel_table import kernels_of
from effc.runtime.metrics import measure
from effc.runtime.smaller import smaller
from effc.runtime.stage import run_stage
from effc.specs.recipe import Ref

from .tiny_models import Sequences, blank, filled, on_meta, outputs

CODE = Ref("code")
IDS = torch.arange(36).view(3, 12)


def rewritten(method: Rewrite, model: Model) -> Model:
    return run_stage(method, [model], Context(seed=1)).model


def test_a_window_over_the_context_alone_is_the_model_itself(tiny: Model) -> None:
    same = rewritten(Liger(window=64, mix=1.0), tiny)
    assert torch.equal(outputs(same, IDS), outputs(tiny, IDS))
    assert generate(same, IDS, max_new_tokens=9).tolist() == generate(tiny, IDS, max_new_tokens=9).tolist()


@pytest.mark.parametrize("form", ["gla", "hgrn2", "gsa"])
def test_liger_adds_no_weight_and_shares_those_there_are(form: Any, tiny: Model) -> None:
    linear = rewritten(Liger(form=form, window=4), tiny)
    assert count(linear).params == count(tiny).params
    assert {n: t.data_ptr() for n, t in linear.tensors().items()} == {
        n: t.data_ptr() for n, t in tiny.tensors().items()
    }
    assert difference(outputs(tiny, IDS), outputs(linear, IDS)) > 0.01


def test_the_recurrence_is_the_formula_of_the_paper(tiny: Model) -> None:
    """One head of one block, token by token, from the projections alone."""
    block: Any = rewritten(Liger(window=0), tiny).module("layers.2.attention")
    x = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    q, k, v = (linear(x)[0] for linear in (block.q, block.k, block.v))
    state = torch.zeros(8, 8)
    rows = []
    for t in range(6):
        key, value = k[t, :8], v[t, :8]  # the first key head
        state = torch.diag(key.sigmoid() ** (1 / 16)) @ state + torch.outer(key.softmax(-1), value)
        rows.append(q[t, 8:16].softmax(-1) @ state)  # the second query head reads it
    other = block.o.weight.data.clone()
    block.o.weight = torch.nn.Parameter(torch.eye(32))
    got = block(x, tiny.step(torch.zeros(1, 6)))
    block.o.weight = torch.nn.Parameter(other)
    torch.testing.assert_close(got[0, :, 8:16], torch.stack(rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "method",
    [Liger(window=4), Liger(window=4, form="gsa", slots=2), GLA(heads=2), Liger(window=0, form="hgrn2")],
    ids=["liger", "gsa", "gla", "hgrn2"],
)
def test_the_cache_stops_growing_and_is_as_predicted(method: Rewrite, tiny: Model) -> None:
    linear = rewritten(method, tiny)
    sizes = []
    for tokens in (2, 4, 30):
        cache = Cache(tokens)
        ids = torch.zeros(1, 1, dtype=torch.long)
        with torch.no_grad():
            for _ in range(tokens):
                linear(ids, step=linear.step(ids, None, cache))
        sizes.append(cache.bytes)
        assert cache.bytes == measure(linear, "kv_bytes", arguments=(tokens,))
    assert sizes[1] == sizes[2] == count(linear).state_bytes
    assert count(linear).kv_bytes_per_token == 0
    assert measure(tiny, "kv_bytes", arguments=(30,)) == 15 * measure(tiny, "kv_bytes", arguments=(2,))


def test_sizes_and_work_follow_their_formulas(tiny: Model) -> None:
    base = count(tiny, 512)
    liger = count(rewritten(Liger(window=4), tiny), 512)
    attended, scanned = 4 * 4 * 8, 64 * (8 + 8)
    assert liger.flops_per_token - base.flops_per_token == 6 * (
        4 * attended + 4 * scanned + 2 * (4 + 2) * 64 - 4 * 4 * 512 * 8
    )
    assert liger.state_bytes == 6 * (2 * 8 * 8 * 4 + 4 * 2 * 2 * 8 * 4)
    gla = count(rewritten(GLA(heads=2, gate_rank=3), tiny))
    keys, values = 16, 32
    block = 32 * (2 * keys + 2 * values) + 3 * (32 + keys) + keys + values // 2 + values * 32
    assert gla.params - base.params == 6 * (block - 32 * (32 + 16 + 16 + 32))
    assert gla.state_bytes == 6 * 2 * 8 * 16 * 4


def test_some_layers_change_and_the_others_stay(tiny: Model) -> None:
    linear = rewritten(Liger(window=4, select=("layers[1..4].attention",)), tiny)
    kinds = [type(linear.module(f"layers.{i}.attention")) for i in range(6)]
    assert kinds == [Attention, *[LigerAttention] * 4, Attention]
    assert cache_bytes(linear, 100) == 2 * 100 * 2 * 2 * 8 * 4 + 4 * (2 * 8 * 8 * 4 + 4 * 2 * 2 * 8 * 4)


def test_new_blocks_start_as_the_seed_says(tiny: Model) -> None:
    one, again, other = (
        run_stage(GLA(heads=2), [tiny], Context(seed=seed)).model.module("layers.0.attention.q").weight
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert float(one.std()) == pytest.approx(32**-0.5, rel=0.1)


def test_liger_heals_by_adapters_that_fold_and_quantize(tiny: Model) -> None:
    linear = rewritten(Liger(window=4), tiny)
    data = Context(data={"data": Sequences(tiny)})
    chosen = ("attention.q", "attention.k", "attention.v")
    healed = fit(Lora(data=CODE, steps=2, batch=2, rank=2, select=chosen), linear, data).model
    folded = rewritten(Fold(), healed)
    assert difference(outputs(healed, IDS), outputs(folded, IDS)) < 1e-5
    small = rewritten(RTN(bits=8), folded)
    assert isinstance(small.module("layers.3.attention"), LigerAttention)
    assert small.generate(IDS, max_new_tokens=4).shape == (3, 16)


def test_packed_weights_are_taken_over(tiny: Model) -> None:
    small = rewritten(RTN(bits=8), tiny)
    linear = rewritten(Liger(window=64, mix=1.0), small)
    assert torch.equal(outputs(linear, IDS), outputs(small, IDS))


def test_it_has_a_program_which_is_planned_without_weights(tiny: Model) -> None:
    linear = rewritten(Liger(window=4), tiny)
    assert lower(on_meta(linear)).plan.calls
    rows = kernels_of(linear)["rows"]
    assert any(row["nodes"] == "attention" and row["kernel"].startswith("recur") for row in rows)


@pytest.mark.parametrize("method", [Liger(window=4), Liger(window=4, form="gsa", slots=4), GLA(heads=2)])
def test_a_narrow_copy_keeps_the_blocks(method: Rewrite, tiny: Model) -> None:
    linear = rewritten(method, tiny)
    linear.architecture = ""
    copy = smaller(linear).materialize()
    assert type(copy.module("layers.0.attention")) is type(linear.module("layers.0.attention"))
    assert bool(torch.isfinite(outputs(copy, IDS)).all())


def titles(method: Any, model: Model) -> list[str]:
    return [d.title for d in method.refuses(on_meta(model))]


def test_what_cannot_be_linear_is_refused(tiny: Model) -> None:
    linear = rewritten(Liger(window=4), tiny)
    for method in (Liger(), GLA()):
        assert "`layers.0.attention` is none" in titles(method, linear)[0]
        assert "`layers.0.mlp` is none" in titles(method.model_copy(update={"select": ("mlp",)}), tiny)[0]
    seeing = filled(blank(layers=2))
    for _, unit in seeing.units():
        if isinstance(unit, Attention):
            unit.causal = False
    assert "sees the past alone" in titles(Liger(), seeing)[0]
    assert "sees the past alone" in titles(GLA(), seeing)[0]
    placed = filled(blank(layers=2))
    for _, unit in placed.units():
        if isinstance(unit, Attention):
            unit.rope = None
    assert "needs rotary positions" in titles(Liger(), placed)[0]
    assert titles(GLA(heads=2), placed) == []
    tiny.config["max_position_embeddings"] = 64
    assert titles(Liger(window=65), tiny) == ["a window of 65 tokens is longer than the model's context"]
    (problem,) = Liger(form="gsa", slots=3).refuses(tiny)
    assert (problem.about, problem.help) == ("slots", "use slots in {1, 2, 4, 8}")
    (problem,) = GLA(heads=3, expand_v=1.5).refuses(tiny)
    assert (problem.code, problem.about) == ("E320", "heads")
    assert "16 channels of `expand_k`" in problem.title


@pytest.mark.parametrize(
    ("method", "wrong"),
    [
        (GLA, {"gate_div": 0.0}),
        (GLA, {"heads": 0}),
        (GLA, {"chunk": 40}),
        (Liger, {"mix": 0.0}),
        (Liger, {"mix": 1.0, "window": 0}),
        (Liger, {"slots": 4}),
        (Liger, {"mix": 1.5}),
    ],
)
def test_values_that_make_no_sense_are_refused(method: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        method.model_validate(wrong)


def test_the_state_is_float32_where_weights_are_half(tiny: Model) -> None:
    linear = rewritten(GLA(heads=2), filled(blank(dtype="bfloat16")))
    block = linear.module("layers.0.attention")
    assert isinstance(block, GatedLinearAttention)
    assert block.dtype == "bfloat16"
    assert block.state_bytes() == 2 * 8 * 16 * 4
    assert bool(torch.isfinite(outputs(linear, IDS)).all())


def test_editing_leaves_the_books_in_order(tiny: Model) -> None:
    rw = Rewriter(tiny, "linearize.liger")
    Liger(window=4).rewrite(rw)
    model = rw.done()
    assert rw.origins == {name: name for name in model.tensors()}
    assert [e.verb for e in rw.log] == ["swap"] * 6
    assert rw.log[0].detail == "Attention -> gla, window 4, mix 0.5"
