"""The common checks find a careless method by name, and let a waiver pass with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import pytest
import torch
from pydantic import Field

from effc.compiler.contract import EXACT, LOSSY, Contract, Fact
from effc.compiler.rewrite import Rewriter
from effc.compiler.rule import Ruled, rule
from effc.compiler.shapes import Rewrite
from effc.specs.paper import FOLKLORE
from effc.testing import check_method


class Careless(Rewrite):
    """Says EXACT, adds noise, writes into its input, and hides what it costs."""

    paper = FOLKLORE
    contract = Contract(EXACT, gives=(Fact("sparse"),))
    examples = ("fold.careless()",)

    strength: float = Field(default=1.0, ge=0.5, json_schema_extra={})

    def rewrite(self, rw: Rewriter) -> None:
        weight = rw.module("layers.0.mlp.up").weight
        if not weight.is_meta:
            weight.data.mul_(1.5)
        rw.untie("head")

    def outline(self, rw: Rewriter, others: object) -> None:
        """Leaves the head tied, which is not what happens."""


def test_a_careless_method_is_told_everything_at_once() -> None:
    with pytest.raises(AssertionError) as caught:
        check_method(Careless)
    said = str(caught.value)
    for name in (
        "documents_itself",
        "leaves_its_input_alone",
        "keeps_its_contract",
        "predicts_its_cost_exactly",
    ):
        assert f"\n{name}" in said, said
    assert "\nroles_stay_true" not in said
    assert said.startswith("`fold.careless` fails ")


@rule("nothing", "mlp[layer=99]")
def nothing(rw: Rewriter, hit: object) -> None:
    raise AssertionError("there is no such layer")


class Idle(Ruled):
    """Look for a layer that no tiny model has.

    Use when: never.
    Costs:    nothing.
    """

    paper = FOLKLORE
    contract = Contract(LOSSY)
    examples = ("fold.idle()",)
    rules = (nothing,)


def test_a_method_that_finds_nothing_refuses_and_says_what_it_looked_for() -> None:
    with pytest.raises(AssertionError, match=r"finds nothing to edit(.|\n)*looks for mlp\[layer=99\]"):
        check_method(Idle)


class Restless(Rewrite):
    """Write other numbers each time.

    Use when: never.
    Costs:    nothing.
    """

    paper = FOLKLORE
    contract = Contract(LOSSY)
    examples = ("fold.restless()",)

    def rewrite(self, rw: Rewriter) -> None:
        weight = rw.module("layers.0.mlp.up").weight
        noise = torch.rand(
            weight.shape, generator=torch.Generator().manual_seed(id(self) % 1000 + len(DRAWS))
        )
        DRAWS.append(1)
        rw.write("layers.0.mlp.up", "weight", noise if not weight.is_meta else weight.clone())


DRAWS: list[int] = []


class Waived(Restless):
    """Write other numbers each time, and say so.

    Use when: never.
    Costs:    nothing.
    """

    examples = ("fold.waived()",)
    waives: ClassVar[Mapping[str, str]] = {"same_seed_gives_the_same_numbers": "a test"}


def test_a_waiver_leaves_one_check_out() -> None:
    with pytest.raises(AssertionError, match="same_seed_gives_the_same_numbers"):
        check_method(Restless)
    assert not [done for done in check_method(Waived) if done.startswith("same_seed")]
