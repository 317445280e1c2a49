"""Widths of one model: masked in place, trained together, cut out; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from effc.compiler.blocks import MLP, Attention
from effc.compiler.cost import count
from effc.compiler.exporter import inexpressible
from effc.compiler.isolation import isolation
from effc.compiler.method import Context
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.passes.adaptive._widths import at_width, cut, divided
from effc.passes.adaptive.select import Select
from effc.passes.adaptive.slimmable import Slimmable
from effc.passes.quantize.rtn import RTN
from effc.passes.tie.recursive import Recursive
from effc.runtime.fit import fit
from effc.runtime.generate import generate
from effc.runtime.stage import run_stage
from effc.specs.recipe import Ref
from tests.compiler.conftest import DECODERS, fill

from .skipped import Again
from .tiny_models import Sequences, blank, filled, on_meta, outputs

CODE = Ref("code")
IDS = torch.randint(0, 48, (3, 9), generator=torch.Generator().manual_seed(4))
FAMILIES = ["llama", "gemma2", "gpt2", "neox"]
"""Those with two key heads or more."""


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Model:
    return fill(DECODERS[request.param]())


def method(**more: Any) -> Slimmable:
    return Slimmable.model_validate({"data": CODE, "steps": 1, "batch": 2} | more)


@pytest.mark.parametrize("config", [(0.5, 0.5), (0.5, 1.0), (1.0, 0.5)])
def test_what_is_cut_out_is_what_was_masked(family: Model, config: tuple[float, float]) -> None:
    rw = Rewriter(family)
    cut(rw, config, divided(family, 0.5))
    narrow = rw.done()
    with at_width(family, config, divided(family, 0.5)):
        masked = outputs(family, IDS)
    assert float((outputs(narrow, IDS) - masked).abs().max()) <= 1e-5
    assert float((masked - outputs(family, IDS)).abs().max()) > 1e-3
    assert count(narrow).params < count(family).params
    assert {type(u) for p, u in narrow.units() if p.endswith((".mlp", ".attention"))} == {MLP, Attention}
    assert generate(narrow, IDS, max_new_tokens=3).shape == (3, 12)


def test_the_whole_model_is_a_width_of_its_own(family: Model) -> None:
    with at_width(family, (1.0, 1.0), 1):
        assert torch.equal(outputs(family, IDS), outputs(family.clone(), IDS))


def test_the_line_lies_between_two_layers() -> None:
    model = filled(blank(layers=6))
    assert [divided(model, s) for s in (0.01, 0.34, 0.5, 0.99)] == [1, 2, 3, 5]


def test_costs_are_those_of_the_models_that_come_out(family: Model) -> None:
    for budget in (0.65, 0.8, 0.95):
        chosen = Select.model_validate({"budget": budget})
        if chosen.refuses(family):
            continue
        from effc.compiler.plan import ATTENDED

        small = run_stage(chosen, [family], Context()).model
        share = count(small, ATTENDED).flops_per_token / count(family, ATTENDED).flops_per_token
        assert share == pytest.approx(chosen.costs(family)[chosen.chosen(family)], rel=1e-9)
        assert share <= budget
        others = [c for c in chosen.costs(family).values() if share < c <= budget]
        assert not others


def test_a_uniform_width_is_a_model_of_its_family() -> None:
    model = filled(blank())
    small = run_stage(Select(budget=0.65), [model], Context()).model
    assert count(small, 0).kv_bytes_per_token == count(model, 0).kv_bytes_per_token // 2
    assert isolation(run_stage(Select(budget=0.65), [filled(blank(layers=2))], Context()).model).isolated
    assert inexpressible(small) is not None


def test_each_step_trains_the_whole_the_narrowest_and_some() -> None:
    trained = method(widths=(0.25, 0.5, 1.0))
    assert trained.configs()[0] == (0.25, 0.25)
    assert trained.configs()[-1] == (1.0, 1.0)
    assert len(trained.configs()) == 9
    torch.manual_seed(0)
    drawn = [trained.drawn(step) for step in range(40)]
    assert all(configs[0] == (0.25, 0.25) for configs in drawn)
    assert all(1 <= len(configs) <= 3 for configs in drawn)
    assert {c for configs in drawn for c in configs} == set(trained.configs()) - {(1.0, 1.0)}
    torch.manual_seed(0)
    assert drawn == [trained.drawn(step) for step in range(40)]
    assert method(widths=(1.0,)).drawn(0) == []
    assert method(sandwich=False, random=0).drawn(0) == []


def test_training_lowers_the_surprise_of_every_width(tiny: Model) -> None:
    data = Again(tiny, count=8)
    trained = method(steps=25, batch=8, optimizer=None)
    outcome = fit(trained, tiny, Context(data={"data": data}))
    before = trained.measure(tiny, data)["widths"]
    after = outcome.measures["widths"]
    assert set(after) == {"50% 50%", "50% 100%", "100% 50%", "100% 100%"}
    assert all(after[name] < before[name] for name in after)
    for config, name in (((0.5, 0.5), "50% 50%"), ((1.0, 0.5), "100% 50%")):
        rw = Rewriter(outcome.model)
        cut(rw, config, divided(tiny, 0.5))
        batch = data.batch("heldout", range(8))
        z = outputs(rw.done(), batch.ids)
        loss = torch.nn.functional.cross_entropy(z.flatten(0, 1), batch.labels.flatten())
        assert float(loss) == pytest.approx(after[name], rel=1e-4)


def test_what_the_encoder_hands_over_is_compared(tiny: Model) -> None:
    """The gap vanishes where the narrow encoder equals the whole one, and its weight counts."""
    batch = Sequences(tiny).batch("train", range(2))
    wide = method(enc_widths=(1.0,), dec_widths=(0.5, 1.0), ci_kd=0.0).loss(tiny, {}, batch)["total"]
    same = method(enc_widths=(1.0,), dec_widths=(0.5, 1.0), ci_kd=9.0).loss(tiny, {}, batch)["total"]
    torch.testing.assert_close(wide, same)
    low, high = (method(ci_kd=w, random=0).loss(tiny, {}, batch)["total"] for w in (0.0, 9.0))
    assert float(high) > float(low) + 0.05


def codes(chosen: Any, model: Model) -> list[tuple[str, str]]:
    return [(p.code, p.title) for p in chosen.refuses(on_meta(model))]


def test_widths_that_cannot_be_are_refused(tiny: Model, mixture: Model) -> None:
    for made in (lambda **more: method(**more), lambda **more: Select.model_validate({"budget": 0.9} | more)):
        ((code, title),) = codes(made(widths=(0.25, 1.0)), tiny)
        assert code == "E331"
        assert "of the 2 key heads" in title
        assert codes(made(), run_stage(RTN(bits=8), [tiny], Context()).model)[0][0] == "E323"
        assert codes(made(), mixture)[0][0] == "E323"
        assert codes(made(), run_stage(Recursive(loops=2), [tiny], Context()).model)[0][0] == "E341"
        assert codes(made(), filled(blank(layers=1)))[0][0] == "E330"
    ((code, title),) = codes(Select(budget=0.1), tiny)
    assert (code, title) == ("E331", "no configuration fits 10% of the FLOPs a token")
    assert codes(Select(budget=1.0), tiny)[0][0] == "E325"


@pytest.mark.parametrize(
    "wrong", [{"widths": (0.5,)}, {"widths": (0.0, 1.0)}, {"widths": ()}, {"split": 1.0}, {"ci_kd": -1.0}]
)
def test_arguments_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        method(**wrong)
    with pytest.raises(ValueError, match="validation error"):
        Select.model_validate({"budget": 0.5, "widths": (0.0, 0.5)})
