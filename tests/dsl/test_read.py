"""Settings, sweeps, used files and the judging of expects."""

from __future__ import annotations

from pathlib import Path

import pytest

from effc.dsl.read import read, read_file, sweep
from effc.runtime.catalogue import catalogue
from effc.specs.diagnostic import EffcError
from effc.specs.recipe import Metric, Recipe, Ref, judge
from effc.specs.source import Source

HEAD = 'effc 1\nparam bits = 4\nmodel base = load("zoo:pylm")\n'
BODY = HEAD + "small = quantize.rtn(base, bits = bits)\n"


def recipe(text: str) -> Recipe:
    return read(Source("x.effc", text), catalogue()).recipe


def test_a_sweep_is_the_product_of_its_values() -> None:
    text = BODY.replace("param", "param group = 64\nparam", 1).replace("= bits)", "= bits, group = group)")
    source = Source("x.effc", text + "expect small.bytes <= 6 MB")
    found = sweep(source, catalogue(), ["bits=3,4", "group=64,128"])
    given = [(c.recipe.params["bits"], c.recipe.params["group"]) for c in found]
    assert given == [(3, 64), (3, 128), (4, 64), (4, 128)]
    assert [c.recipe.stage("small").call.arguments["bits"] for c in found] == [3, 3, 4, 4]


def test_used_bindings_come_under_the_alias(tmp_path: Path) -> None:
    (tmp_path / "common.effc").write_text(
        'effc 1\nlet s = 128\ndata code = corpus("python-stdlib", seq = s)\n'
    )
    main = tmp_path / "main.effc"
    main.write_text(
        HEAD + 'use "common.effc" as c\nsmall = quantize.gptq(base, data = c.code, bits = bits)\n'
    )
    found = read_file(main, catalogue())[0].recipe
    assert found.stage("small").call.arguments["data"] == Ref("c.code")
    assert found.stage("c.code").call.arguments["seq"] == 128


def test_bindings_stand_after_what_they_need() -> None:
    text = "effc 1\nb = quantize.rtn(a)\na = load_it(base)\n".replace("load_it", "prune.magnitude")
    names = [b.name for b in recipe(text + 'model base = load("zoo:pylm")\nexpect b.bytes < 6 MB').bindings]
    assert names == ["base", "a", "b"]


def test_expects_are_judged_from_measured_values() -> None:
    made = recipe(
        BODY + 'data code = corpus("python-stdlib")\nexpect small.loss(code) <= base.loss(code) + 2%'
    ).expects[0]
    losses = {"small": 2.03, "base": 2.0}

    def measured(metric: Metric) -> float:
        return losses[metric.model]

    assert judge(made, measured).holds
    losses["small"] = 2.05
    verdict = judge(made, measured)
    assert not verdict.holds
    assert (verdict.left, verdict.right) == (2.05, pytest.approx(2.04))
    assert "fails" in verdict.text
    losses["small"] = float("nan")
    assert not judge(made, measured).holds


def test_units_reach_the_base_unit() -> None:
    made = recipe(BODY + "expect small.bytes <= 6 MiB").expects[0]
    assert made.right.base == 6 * 2**20


def test_all_problems_come_at_once() -> None:
    with pytest.raises(EffcError) as found:
        recipe("effc 1\nx = quantize.rtn(nothing, bits = 99, bots = 3)\ny = ?\nexpect x.size < 3")
    assert {d.code for d in found.value.diagnostics} >= {"E205", "E202", "E203", "E105"}
