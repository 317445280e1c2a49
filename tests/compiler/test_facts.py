"""Every fact that recipes reason with can be measured, and is measured truly."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from effc import specs
from effc.compiler.contract import EXACT, WITHIN, Contract, Fact
from effc.compiler.facts import PREDICATES, facts_of, holds
from effc.compiler.probe import difference
from effc.compiler.rewrite import Rewriter
from effc.passes.prune.magnitude import Magnitude
from effc.passes.quantize.rtn import RTN
from tests.passes.tiny_models import blank, filled


def test_every_name_has_a_predicate() -> None:
    names = yaml.safe_load((Path(specs.__path__[0]) / "facts.yaml").read_text())["facts"]
    assert set(PREDICATES) == set(names)


def test_facts_print_as_recipes_know_them() -> None:
    fact = Fact("sparse_2_4", "select").when(pattern="2:4")
    assert str(fact) == "sparse_2_4(select) when pattern = 2:4"
    assert fact.applies(Magnitude(pattern="2:4"))
    assert not fact.applies(Magnitude())
    assert str(WITHIN(0.01)) == "WITHIN(0.01)"
    assert Contract(EXACT).fidelity.tolerance == 1e-9


def test_a_plain_model_is_dense_and_nothing_else() -> None:
    known = facts_of(filled(blank(tied=False)))
    assert {name for name, true in known.items() if true} == {"dense", "trainable"}


def test_what_was_packed_or_pruned_is_seen() -> None:
    model = filled(blank())
    method = Magnitude(pattern="2:4")
    rw = Rewriter(model)
    method.rewrite(rw)
    thin = rw.done()
    assert holds(Fact("sparse_2_4", "select"), thin, method)
    assert not holds(Fact("sparse_2_4", "select"), model, method)
    assert not holds(Fact("sparse", "head"), thin)
    rw = Rewriter(thin)
    RTN(bits=4, group=16).rewrite(rw)
    small = rw.done()
    assert holds(Fact("packed", "select"), small, RTN())
    assert holds(Fact("sparse_2_4", "select"), small, method)
    assert not holds(Fact("packed"), small)
    assert facts_of(small)["tied"]


def test_a_difference_is_measured_against_the_range() -> None:
    before = torch.tensor([0.0, 10.0])
    assert difference(before, torch.tensor([0.0, 9.0])) == 0.1
    assert difference(before, torch.tensor([0.0, float("nan")])) == float("inf")
    assert difference(before, torch.zeros(3)) == float("inf")
