"""Kernels of mixtures in C: their definitions on every set of instructions, the same bits by any members."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from effc.kernels.cpu.check import Op, wrong
from effc.kernels.cpu.isa import available
from effc.kernels.dense_linear.spec import DenseLinearSpec
from effc.kernels.experts import combine, linear, route, spread
from effc.kernels.experts.combine import CombineSpec
from effc.kernels.experts.linear import ExpertLinearSpec
from effc.kernels.experts.route import RouteSpec
from effc.kernels.experts.spread import SpreadSpec
from effc.kernels.kernel import KernelSpec
from effc.kernels.quant_linear.spec import QuantLinearSpec

W4 = QuantLinearSpec(bits=4, group=32, paired=True, epilogue=("silu",))
PAIR = DenseLinearSpec(weight="bfloat16", paired=True, epilogue=("gelu",))
SPECS: list[tuple[object, KernelSpec]] = [
    (route, RouteSpec(form="best", experts=5, active=2)),
    (route, RouteSpec(form="best", experts=40, active=7, renormalize=False)),
    (route, RouteSpec(form="above", experts=6, active=6, act="sigmoid", tau=0.3, least=0.15)),
    (route, RouteSpec(form="above", experts=3, active=3, act="gelu", tau=2.0)),
    (route, RouteSpec(form="largest", experts=19, active=1)),
    (spread, SpreadSpec(experts=5, active=2)),
    (linear, ExpertLinearSpec(experts=5, active=2, dense=PAIR)),
    (linear, ExpertLinearSpec(experts=3, active=3, dense=DenseLinearSpec())),
    (linear, ExpertLinearSpec(experts=4, active=2, packed=W4)),
    (linear, ExpertLinearSpec(experts=4, active=1, packed=QuantLinearSpec(bits=8, group=0, symmetric=False))),
    (combine, CombineSpec(active=3)),
    (combine, CombineSpec(active=1, weighted=False, residual=True)),
]


@pytest.mark.parametrize(("op", "spec"), SPECS, ids=lambda one: getattr(one, "op", ""))
def test_equals_its_definition_on_every_set_and_number_of_members(op: object, spec: KernelSpec) -> None:
    assert {isa: wrong(cast(Op, op), spec, None, isa) for isa in available()} == dict.fromkeys(
        available(), ""
    )


def test_the_first_of_equal_scores_is_chosen() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    weights, chosen = route.reference(RouteSpec(form="best", experts=4, active=2), scores)
    assert chosen.tolist() == [[1, 2]]
    assert weights.tolist() == [[0.5, 0.5]]


def test_experts_that_are_left_out_have_no_place() -> None:
    place, rows = spread.reference(SpreadSpec(experts=3, active=2), torch.tensor([[2, 3], [0, 2]]).int())
    assert place.tolist() == [[1, -1], [0, 2]]
    assert rows.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"form": "best", "experts": 2, "active": 3}, "3 active experts of 2"),
        ({"form": "above", "experts": 4, "active": 2}, "the form above of 4 experts has not 2 active"),
    ],
)
def test_a_routing_that_cannot_be_is_refused(given: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RouteSpec.model_validate(given)


def test_experts_with_operands_are_refused() -> None:
    with pytest.raises(ValueError, match="experts have no bias"):
        ExpertLinearSpec(experts=2, active=1, dense=DenseLinearSpec(epilogue=("bias",)))
    with pytest.raises(ValueError, match="one of both"):
        ExpertLinearSpec(experts=2, active=1)
    assert ExpertLinearSpec(experts=4, active=2, packed=W4).bytes(2, 64, 64) == 2 * W4.bytes(64, 64)
