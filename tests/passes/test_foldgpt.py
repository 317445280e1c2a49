"""Gates on layers, removal, groups that share: what must hold, on several families, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from effc.compiler.blocks.learned_scale import LearnedScale
from effc.compiler.contract import EXACT
from effc.compiler.cost import count
from effc.compiler.isolation import isolation
from effc.compiler.method import Context
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.passes.adapt.full import Full
from effc.passes.distill._hidden import distance, matched
from effc.passes.distill.hidden import Hidden
from effc.passes.quantize.rtn import RTN
from effc.passes.tie.foldgpt import FoldGPT
from effc.runtime.fit import fit
from effc.runtime.generate import generate
from effc.runtime.parts.train.optimizer.adamw import AdamW
from effc.specs.recipe import Ref
from tests.compiler.conftest import DECODERS, fill

from .tiny_models import Sequences, blank, filled, on_meta, outputs

CODE = Ref("code")
IDS = torch.arange(36).view(3, 12)
FAMILIES = ("llama", "qwen3", "gemma2", "gpt2", "mixtral", "neox")


def folded(model: Model, **given: object) -> Model:
    method = FoldGPT.model_validate({"data": CODE, "steps": 2, "batch": 2, "precision": "fp32"} | given)
    return fit(method, model, Context(1, {"data": Sequences(model)})).model


@pytest.mark.parametrize("family", FAMILIES)
def test_open_gates_change_no_bit(family: str) -> None:
    model = fill(DECODERS[family]())
    method = FoldGPT(data=CODE, keep_first=0, keep_last=0)
    rw = Rewriter(model)
    method.prepare(rw, ())
    method.begin(rw, 0)
    gated = rw.done()
    assert torch.equal(outputs(gated, IDS), outputs(model, IDS))
    assert len(method.trains(gated)) == model.layers
    assert sum(isinstance(unit, LearnedScale) for _, unit in gated.units()) == 2 * model.layers
    assert isolation(gated).isolated


@pytest.mark.parametrize("family", FAMILIES)
def test_a_closed_gate_is_a_layer_that_is_gone(family: str) -> None:
    model = fill(DECODERS[family]())
    method = FoldGPT(data=CODE, keep_first=0, keep_last=0)
    rw = Rewriter(model)
    method.prepare(rw, ())
    method.begin(rw, 0)
    rw.write("layers.1.fold_gate0", "weight", torch.zeros(1))
    without = Rewriter(model)
    without.remove_layers([1])
    torch.testing.assert_close(outputs(rw.done(), IDS), outputs(without.done(), IDS), rtol=1e-5, atol=1e-5)


def test_gates_alone_move_and_find_a_layer_that_does_harm() -> None:
    model = fit(
        Full(data=CODE, steps=60, batch=8, precision="fp32", optimizer=AdamW(lr=3e-3)),
        filled(blank()),
        Context(1, {"data": Sequences(filled(blank()), 480)}),
    ).model
    noise = torch.randn(32, 48, generator=torch.Generator().manual_seed(3))
    model.place("layers.3.mlp.down.weight", noise)
    method = FoldGPT(data=CODE, steps=30, batch=8, remove=0.17, precision="fp32")
    found = fit(method, model, Context(1, {"data": Sequences(model, 240)}))
    scores = found.measures["scores"]
    assert min(scores, key=scores.get) == "layers.3"
    assert set(scores) == {"layers.1", "layers.2", "layers.3"}
    without = Rewriter(model)
    without.remove_layers([3])
    assert torch.equal(outputs(found.model, IDS), outputs(without.done(), IDS)), "weights do not move"


def test_groups_use_the_weights_of_their_first_and_keep_their_norms(tiny: Model) -> None:
    small = folded(tiny, remove=0.17, group=2)
    assert small.layers == 5
    ties = {a: o for a, o in small.ties().items() if a.startswith("layers")}
    assert set(ties) == {
        f"layers.{i}.{name}.weight"
        for i in (1, 3)
        for name in (
            "attention.q",
            "attention.k",
            "attention.v",
            "attention.o",
            "mlp.up",
            "mlp.gate",
            "mlp.down",
        )
    }
    assert all(
        owner == alias.replace(f"layers.{alias[7]}", f"layers.{int(alias[7]) - 1}")
        for alias, owner in ties.items()
    )
    block, norms = 3 * 32 * 32 + 3 * 48 * 32, 2 * 32
    assert count(tiny).params - count(small).params == (6 - 3) * block + (6 - 5) * norms
    assert count(folded(tiny, remove=0.17, group=2, tie_norms=True)).params == count(small).params - 2 * norms
    per_layer = (count(tiny, 8) - count(folded(tiny, remove=0.17), 8)).flops_per_token
    assert count(small, 8).flops_per_token == count(tiny, 8).flops_per_token - per_layer
    assert count(small).kv_bytes_per_token * 6 == count(tiny).kv_bytes_per_token * 5


def test_shared_weights_train_as_one_and_are_packed_once(tiny: Model) -> None:
    small = folded(tiny, remove=0.17, group=5)
    tail = Hidden(data=CODE, teacher=Ref("base"), steps=3, batch=2, map="tail", precision="fp32")
    healed = fit(tail, small, Context(1, {"data": Sequences(tiny)}, {"teacher": tiny})).model
    assert healed.ties() == small.ties()
    up = [healed.module(f"layers.{i}.mlp.up").weight for i in range(5)]
    assert all(weight is up[0] for weight in up)
    assert not torch.equal(up[0], small.module("layers.0.mlp.up").weight)
    rw = Rewriter(healed)
    RTN(bits=8).rewrite(rw)
    packed = rw.done()
    assert len({id(packed.module(f"layers.{i}.mlp.up").packed) for i in range(5)}) == 1


def test_generation_goes_on_behind_a_cache(tiny: Model) -> None:
    small = folded(tiny, remove=0.34, group=2)
    ids = generate(small, IDS[:2, :5], max_new_tokens=4)
    step = outputs(small, ids[:, :-1]).argmax(-1)[:, 4:]
    assert torch.equal(ids[:, 5:], step)


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "nothing to do": ({"remove": 0.0}, "remove at least 8.3%, or group neighbors with group = 2"),
    "too much": ({"remove": 0.7}, "remove at most 50%"),
    "too few left": ({"remove": 0.9, "keep_first": 0, "keep_last": 0}, "remove at most 67%"),
    "a large group": ({"remove": 0.5, "group": 4}, "use at most 3"),
    "all are kept": ({"keep_first": 4, "keep_last": 4}, "4 first and 4 last ones stay"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses_with_the_number_that_works(name: str, tiny: Model) -> None:
    given, words = REFUSED[name]
    method = FoldGPT.model_validate({"data": CODE} | given)
    said = "\n".join(d.render() for d in method.refuses(on_meta(tiny)))
    assert words in said


def test_it_refuses_what_gates_and_groups_are_not_for(tiny: Model) -> None:
    from tests.compiler.conftest import FAMILIES as ALL

    (told,) = FoldGPT(data=CODE, remove=0.5, keep_first=0, keep_last=0).refuses(_deep(ALL["bert"]))
    assert told.code == "E320"
    (uneven,) = FoldGPT(data=CODE, remove=0.17, group=2).refuses(on_meta(tiny))
    assert (uneven.code, uneven.severity) == ("W330", "warning")
    assert "the last group has 1" in uneven.render()
    tied = folded(tiny, remove=0.34, group=2)
    assert FoldGPT(data=CODE, remove=0.25, group=3).refuses(tied)[0].code == "E341"
    assert not [d for d in FoldGPT(data=CODE, remove=0.25).refuses(tied) if d.severity == "error"]
    assert FoldGPT.contract.fidelity != EXACT


def _deep(make: Callable[[], Model]) -> Model:
    """Four layers of a family that has two."""
    rw = Rewriter(make())
    rw.arrange_layers([0, 1, 0, 1])
    return rw.done()


def test_layers_are_compared_where_they_stand() -> None:
    assert matched("uniform", 1, 3, 6) == [(0, 1), (1, 3), (2, 5)]
    assert matched("uniform", 1, 6, 3) == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 1), (5, 2)]
    assert matched("tail", 2, 4, 6) == [(2, 4), (3, 5)]
    assert matched("tail", 9, 2, 6) == [(0, 4), (1, 5)]


@pytest.mark.parametrize("form", ["mse", "cosine", "normalized"])
def test_the_distance_is_what_its_words_say(form: str) -> None:
    dice = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5, 8, generator=dice), torch.randn(2, 5, 8, generator=dice)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, :3] = False
    rows = [(a[i, t], b[i, t]) for i in range(2) for t in range(5) if mask[i, t]]
    plain = {
        "mse": lambda x, y: (x - y).square().mean(),
        "normalized": lambda x, y: (x - y).square().sum() / y.square().sum(),
        "cosine": lambda x, y: 1 - (x @ y) / (x.norm() * y.norm()),
    }[form]
    want = torch.stack([plain(x, y) for x, y in rows]).mean()
    torch.testing.assert_close(distance(form, a, b, mask), want)  # type: ignore[arg-type]
    assert float(distance(form, a, a, None)) == pytest.approx(0.0, abs=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(family: str) -> None:
    model = fill(DECODERS[family]())
    data = Sequences(model)
    method = Hidden(data=CODE, teacher=Ref("base"), steps=1, kd=1.0, ce=0.0)
    found = method.loss(model.clone(), {"teacher": model}, data.batch("train", range(2)))
    assert float(found["hidden"]) == 0.0
    assert float(found["total"]) == pytest.approx(0.0, abs=1e-5)


def test_hidden_refuses_layers_and_widths_that_are_not_there(tiny: Model) -> None:
    method = Hidden(data=CODE, teacher=Ref("base"), steps=1, pairs=((1, 6),))
    (told,) = method.refuses(tiny, [tiny])
    assert (told.code, told.about) == ("E331", "pairs")
    assert told.notes == ("its layers are 0 to 5",)
    with pytest.raises(ValueError, match="pairs name the layers, and so does map"):
        Hidden(data=CODE, teacher=Ref("base"), steps=1, pairs=((1, 1),), map="tail")
    wide = fill(DECODERS["gpt2"]())
    wide.module("embedding").width = 64
    words = Hidden(data=CODE, teacher=Ref("base"), steps=1).refuses(tiny, [wide])
    assert "the student's is 32, the teacher's 64" in "\n".join(d.render() for d in words)
