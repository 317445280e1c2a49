"""Merged adapters compute the weighted sum of what each computed; factors of products are never mixed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effc.compiler.adapters import adapted, bare
from effc.compiler.blocks.lora_linear import LoraLinear
from effc.compiler.cost import count
from effc.compiler.method import Context
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.passes.adapt.fold import Fold
from effc.passes.merge.linear import Linear as Mean
from effc.passes.merge.slerp import Slerp
from effc.passes.merge.task_arithmetic import TaskArithmetic
from effc.passes.merge.ties import Ties
from effc.passes.reparam.low_rank import LowRank
from effc.runtime.calibrate import calibrate
from effc.runtime.merge import merge
from effc.runtime.rewriting import rewrite
from effc.specs.diagnostic import EffcError
from effc.specs.recipe import Ref
from tests.passes.test_merge import made

BASE = Ref("base")


def with_adapter(model: Model, seed: int, rank: int, alpha: float, paths: tuple[str, ...]) -> Model:
    rw, dice = Rewriter(model), torch.Generator().manual_seed(seed)
    for path in paths:
        unit = LoraLinear.over(rw.linear(path), rank, alpha, "rank")
        for name in ("a", "b"):
            noise = torch.randn(getattr(unit, name).shape, generator=dice)
            setattr(unit, name, torch.nn.Parameter(noise, requires_grad=False))
        rw.swap(path, unit)
    return rw.done()


def weight(model: Model, path: str) -> torch.Tensor:
    """What stands at a path as one matrix, in float64."""
    unit = model.module(path)
    if isinstance(unit, LoraLinear):
        return (unit.base.get_parameter("weight") + unit.change()).double()
    return unit.get_parameter("weight").double()


PATHS = ("layers.0.attention.q", "layers.1.mlp.down", "layers.1.attention.v")


@settings(deadline=None, max_examples=15)
@given(
    ranks=st.lists(st.integers(1, 3), min_size=2, max_size=2),
    weights=st.lists(st.floats(0.1, 3), min_size=2, max_size=2),
    alphas=st.lists(st.sampled_from([1.0, 8.0, 16.0]), min_size=2, max_size=2),
)
def test_the_mean_of_adapters_is_the_mean_of_their_changes(
    ranks: list[int], weights: list[float], alphas: list[float]
) -> None:
    base = made(0)
    models = [
        with_adapter(base, i, rank, alpha, PATHS[i : i + 2])
        for i, (rank, alpha) in enumerate(zip(ranks, alphas, strict=True))
    ]
    method = Mean(weight=tuple(weights))
    out = merge(method, models, Context()).model.materialize()
    for path in PATHS:
        mean = sum(w * weight(m, path) for w, m in zip(weights, models, strict=True)) / sum(weights)
        torch.testing.assert_close(weight(out, path), mean, rtol=1e-5, atol=1e-5)
    assert adapted(out) == sorted(PATHS)
    assert out.module(PATHS[1]).rank == sum(ranks)
    planned = Rewriter(models[0].clone(), method.kind)
    method.outline(planned, models[1:])
    assert count(planned.done(), 1) == count(out, 1)


def test_changes_of_adapters_are_added_to_the_base() -> None:
    base = made(0)
    models = [with_adapter(base, i, 2, 4.0, PATHS) for i in range(3)]
    method = TaskArithmetic(base=BASE, **{"lambda": 0.5})
    out = merge(method, models, Context(models={"base": base})).model.materialize()
    for path in PATHS:
        moved = weight(base, path) + 0.5 * sum(weight(m, path) - weight(base, path) for m in models)
        torch.testing.assert_close(weight(out, path), moved, rtol=1e-5, atol=1e-5)


def test_a_merged_adapter_folds_to_the_merge_of_the_folded() -> None:
    base = made(3)
    models = [with_adapter(base, i, 2, 4.0, PATHS) for i in range(3)]
    apart = rewrite(Fold(), merge(Mean(), models, Context()).model.materialize(), Context()).model
    folded = [rewrite(Fold(), m, Context()).model.materialize() for m in models]
    together = merge(Mean(), folded, Context()).model.materialize().tensors()
    for name, tensor in apart.materialize().tensors().items():
        torch.testing.assert_close(tensor, together[name], rtol=1e-5, atol=1e-5)


def test_the_inputs_keep_their_adapters() -> None:
    model = with_adapter(made(0), 1, 2, 4.0, PATHS)
    before = {name: tensor.clone() for name, tensor in model.tensors().items()}
    merge(Mean(), [model, with_adapter(made(0), 2, 2, 4.0, PATHS)], Context())
    assert bare(model) is not model
    assert all(torch.equal(before[name], tensor) for name, tensor in model.tensors().items())


@pytest.mark.parametrize("method", [Slerp(), Ties(base=BASE)], ids=lambda m: m.kind)
def test_other_merges_ask_for_folded_adapters(method: Slerp | Ties) -> None:
    base = made(0)
    models = [with_adapter(base, i, 2, 4.0, PATHS) for i in range(2)]
    with pytest.raises(EffcError) as caught:
        merge(method, models, Context(models={} if isinstance(method, Slerp) else {"base": base}))
    assert {d.code for d in caught.value.diagnostics} == {"E457"}
    assert "adapt.fold" in str(caught.value.diagnostics[0].help)


def test_low_rank_factors_are_not_mixed() -> None:
    models = [calibrate(LowRank(rank=4), made(i), Context()).model for i in range(2)]
    with pytest.raises(EffcError, match="factors of weights"):
        merge(Mean(), models, Context())


def test_adapters_of_more_rank_than_the_weight_are_refused() -> None:
    models = [with_adapter(made(0), i, 6, 4.0, ("layers.0.attention.k",)) for i in range(2)]
    with pytest.raises(EffcError, match="of rank 12 together"):
        merge(Mean(), models, Context())
