"""The language as its design page prints it: a recipe, its twin, units, gradients, points, constants."""

from __future__ import annotations

import pytest

from effc.dsl.read import read, sweep
from effc.runtime.catalogue import catalogue
from effc.specs.diagnostic import EffcError
from effc.specs.recipe import Call, Recipe
from effc.specs.source import Source

RECIPE = """\
effc 1
recipe shrink "Half the bytes of the base model, at most 3 % more loss"

param steps = 400                                   # effc compile shrink.effc -p steps=50
let   seq   = 256

model base = load("zoo:pylm")
data  code = corpus("python-stdlib", seq = seq)

thin  = prune.depth(base, keep = 75%, data = code)
heal  = distill.logits(thin, teacher = base, data = code, steps = steps,
                       optimizer = adamw(lr = 3e-4), schedule = wsd(decay = 20%))
small = quantize.gptq(heal, data = code, bits = 4, group = 64,
                      rules = [{on = "layers[0]", bits = 8}, {on = "head", skip = true}])

expect heal.loss(code) <= base.loss(code) + 2%
expect small.loss(code) <= base.loss(code) + 3%
expect small.bytes <= 6 MB

export small as artifact("out/small.effc"), compressed_tensors("out/small-hf")
"""
TWIN = """\
effc: 1
recipe: shrink
params: {steps: 400}
models: {base: {load: "zoo:pylm"}}
data: {code: {corpus: python-stdlib, seq: 256}}
stages:
  - thin: {prune.depth: [$base], keep: 75%, data: $code}
  - small: {quantize.gptq: [$thin], data: $code, bits: 4, group: 64}
expects: ["small.bytes <= 6 MB"]
exports: {small: [{artifact: out/small.effc}]}
"""
HEAD = 'effc 1\nmodel base = load("zoo:pylm")\nsmall = quantize.rtn(base, bits = 4)\n'


def recipe(text: str, name: str = "shrink.effc") -> Recipe:
    return read(Source(name, text), catalogue()).recipe


def test_the_recipe() -> None:
    checked = read(Source("shrink.effc", RECIPE), catalogue())
    assert checked.warnings == ()
    heal = checked.recipe.stage("heal").call
    assert heal.arguments["steps"] == 400
    assert heal.arguments["schedule"] == Call("train.schedule.wsd", {"decay": 0.2})
    assert [e.call.kind for e in checked.recipe.exports] == ["artifact", "compressed_tensors"]
    assert sweep(Source("x", RECIPE), catalogue(), ["steps=50"])[0].recipe.params == {"steps": 50}


def test_the_twin_means_what_the_same_lines_mean_in_text() -> None:
    twin = recipe(TWIN, "shrink.yaml")
    keep = ("effc", "recipe", "param", "model", "data  code", "thin", "expect small.bytes")
    whole = RECIPE.replace("seq = seq", "seq = 256").splitlines()
    lines = [line for line in whole if line.startswith(keep)]
    lines += ["small = quantize.gptq(thin, data = code, bits = 4, group = 64)"]
    text = recipe("\n".join([*lines, 'export small as artifact("out/small.effc")']))
    assert twin.bindings == text.bindings
    assert [(e.left, e.op, e.right) for e in twin.expects] == [(e.left, e.op, e.right) for e in text.expects]
    assert twin.exports == text.exports


@pytest.mark.parametrize(
    ("written", "number"),
    [("6 MB", 6e6), ("2 GiB", 2**31), ("2 MiB", 2**21)],
)
def test_bytes_are_decimal_or_binary_as_written(written: str, number: float) -> None:
    assert recipe(HEAD + f"expect small.bytes <= {written}").expects[0].right.base == number


def test_accuracies_move_in_points_and_the_rest_in_shares() -> None:
    text = HEAD + 'data quiz = choices("quiz.jsonl")\nexpect small.acc(quiz) >= base.acc(quiz) - 1 point'
    assert recipe(text).expects[0].right.value(0.50) == pytest.approx(0.49)
    text = HEAD + 'data code = corpus("python-stdlib")\nexpect small.loss(code) <= base.loss(code) + 3%'
    assert recipe(text).expects[0].right.value(2.0) == pytest.approx(2.06)


def test_a_constant_bounds_a_metric_and_the_command_line_moves_it() -> None:
    text = (
        HEAD.replace("effc 1", "effc 1\nparam budget = 6 MB\nlet most = budget")
        + "expect small.bytes <= most"
    )
    assert recipe(text).expects[0].right.base == 6e6
    (moved,) = sweep(Source("x", text), catalogue(), ["budget=5 MB"])
    assert moved.recipe.expects[0].right.base == 5e6
    assert moved.recipe.expects[0].text == "small.bytes <= most"


def test_a_gradient_reaches_the_recipe_as_its_two_ends() -> None:
    text = HEAD + "thin = prune.magnitude(base, sparsity = depth(0.3, 70%))\nexpect thin.bytes <= 1 GB"
    sparsity = recipe(text).stage("thin").call.arguments["sparsity"]
    assert sparsity == Call("depth", {"first": 0.3, "last": 0.7})
    with pytest.raises(EffcError, match="E214"):
        recipe(text.replace(", 70%)", ")"))


def test_a_bare_word_names_the_template_of_the_model() -> None:
    text = HEAD + 'data talk = chat("talk.jsonl", messages = "m", template = {})'
    for written, given in (("model", "model"), ('"mine.jinja"', "mine.jinja")):
        assert recipe(text.format(written)).stage("talk").call.arguments["template"] == given
