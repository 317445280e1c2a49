"""Pruning against plain references: exact counts, exact patterns, the right weights, the right layers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effc.compiler.method import Context
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.selected import selector_report
from effc.compiler.shapes import Calibrate
from effc.passes.prune import _pattern
from effc.passes.prune._pattern import counts_over_all, lowest, lowest_in_groups
from effc.passes.prune.depth import Depth
from effc.passes.prune.magnitude import Magnitude
from effc.passes.prune.wanda import Wanda
from effc.passes.quantize.rtn import RTN
from effc.runtime.calibrate import calibrate
from effc.specs.recipe import Ref
from effc.specs.select import Rule
from effc.specs.units import Gradient

from .tiny_models import Sequences, blank, filled, on_meta, outputs

CODE = Ref("code")


def pruned(method: Magnitude, model: Model) -> Model:
    rw = Rewriter(model, method.kind)
    method.rewrite(rw)
    return rw.done()


def calibrated(method: Calibrate, model: Model, count: int = 16) -> Model:
    return calibrate(method, model, Context(data={"data": Sequences(model, count)})).model


def zeros(model: Model, path: str) -> int:
    return int((model.module(path).weight == 0).sum())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 40), st.integers(0, 2**31))
def test_lowest_counts_exactly_and_ties_fall_to_the_first(
    rows: int, inputs: int, count: int, seed: int
) -> None:
    count = min(count, inputs)
    scores = torch.randint(0, 4, (rows, inputs), generator=torch.Generator().manual_seed(seed)).float()
    mask = lowest(scores, count)
    order = scores.argsort(dim=1, stable=True)[:, :count]
    assert torch.equal(mask, torch.zeros_like(mask).scatter(1, order, True))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 300), st.integers(0, 2**31))
def test_one_threshold_for_all_counts_exactly(count: int, seed: int) -> None:
    dice = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(n, generator=dice).abs() * s for n, s in ((100, 1.0), (150, 1.0), (80, 2.0))]
    tensors[0][:20] = tensors[1][:20]
    edge = torch.cat(tensors).sort().values
    found = counts_over_all([100, 150, 80], [lambda t=t: t for t in tensors], count)  # type: ignore[misc]
    limits = [99, 148, 79]
    assert sum(found) == count
    assert all(n <= limit for n, limit in zip(found, limits, strict=True))
    if count and all(n < limit for n, limit in zip(found, limits, strict=True)):
        below = [int((t < edge[count - 1]).sum()) for t in tensors]
        upto = [int((t <= edge[count - 1]).sum()) for t in tensors]
        assert all(a <= n <= b for a, n, b in zip(below, found, upto, strict=True))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8)])
def test_patterns_keep_the_largest_of_each_group(n: int, m: int) -> None:
    scores = torch.rand(5, 32, generator=torch.Generator().manual_seed(0))
    kept = ~lowest_in_groups(scores, n, m).view(5, -1, m)
    assert bool((kept.sum(-1) == n).all())
    groups = scores.view(5, -1, m)
    smallest_kept = groups.masked_fill(~kept, 9.0).amin(-1)
    largest_gone = groups.masked_fill(kept, -9.0).amax(-1)
    assert bool((smallest_kept > largest_gone).all())
    assert torch.equal(lowest_in_groups(torch.ones(1, m), n, m)[0], torch.arange(m) < m - n)


@pytest.mark.parametrize("shape", [(1, 999), (3, 333), (1, 30)])
def test_lowest_in_pieces_are_those_at_once(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(0)) * 0.3
    whole = [lowest(scores, n) for n in range(shape[1])]
    monkeypatch.setattr(_pattern, "CHUNK", 40)
    assert all(torch.equal(lowest(scores, n), mask) for n, mask in enumerate(whole))


def test_groups_ordered_in_pieces_are_those_ordered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = lowest_in_groups(scores := torch.rand(7, 16, generator=torch.Generator().manual_seed(0)), 2, 4)
    monkeypatch.setattr(_pattern, "CHUNK", 40)
    assert lowest_in_groups(scores, 2, 4).tolist() == whole.tolist()
    assert whole.sum() == 56


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9])
def test_magnitude_counts_exactly_even_with_equal_weights(sparsity: float, tiny: Model) -> None:
    tiny.module("layers.0.mlp.up").weight.data.fill_(0.5)
    small = pruned(Magnitude(sparsity=sparsity), tiny)
    for path in Magnitude().targets(tiny):
        total = tiny.module(path).weight.numel()
        assert zeros(small, path) == int(sparsity * total + 1e-9)
        kept = small.module(path).weight != 0
        assert torch.equal(small.module(path).weight[kept], tiny.module(path).weight[kept])


def test_global_magnitude_never_empties_a_matrix(tiny: Model) -> None:
    tiny.module("layers.1.attention.k").weight.data.mul_(1e-4)
    small = pruned(Magnitude(sparsity=0.9, scope="global"), tiny)
    paths = list(Magnitude().targets(tiny))
    total = sum(tiny.module(p).weight.numel() for p in paths)
    assert sum(zeros(small, p) for p in paths) == int(0.9 * total)
    size = tiny.module("layers.1.attention.k").weight.numel()
    assert zeros(small, "layers.1.attention.k") == size - -(-size // 100)


def test_a_tied_table_is_pruned_once(tiny: Model) -> None:
    small = pruned(Magnitude(sparsity=0.5, select=("head", "embedding")), tiny)
    assert small.ties() == tiny.ties()
    assert zeros(small, "head") == tiny.module("head").weight.numel() // 2


def spread(scale: Tensor, model: Model) -> Sequences:
    """Sequences for a model whose first norm scales its outputs by `scale`."""
    model.module("layers.0.norm1").weight.data.copy_(scale)
    return Sequences(model, 32)


def norms_at(model: Model, path: str, data: Sequences) -> Tensor:
    """The root mean square of each input of a module, over all sequences."""
    seen: list[Tensor] = []
    handle = model.module(path).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    outputs(model, data.ids)
    handle.remove()
    return torch.cat(seen).double().square().mean(0).sqrt()


def test_wanda_is_its_formula_on_what_pruned_layers_produce(tiny: Model) -> None:
    data = Sequences(tiny)
    small = calibrate(Wanda(data=CODE, sparsity=0.4), tiny, Context(data={"data": data})).model
    for path in ("layers.0.attention.q", "layers.0.mlp.up", "layers.3.attention.v", "layers.5.mlp.gate"):
        before = tiny.module(path).weight.double()
        scores = before.abs() * norms_at(
            small if "attention" in path else _up_to(small, tiny, path), path, data
        )
        count = int(0.4 * before.shape[1])
        expected = torch.zeros_like(before, dtype=torch.bool).scatter(1, scores.argsort(1)[:, :count], True)
        mine = small.module(path).weight == 0
        assert bool((mine.sum(1) == count).all())
        assert float((mine == expected).double().mean()) > 0.995


def _up_to(small: Model, tiny: Model, path: str) -> Model:
    """Layers before that of `path` pruned, this one as it was: what calibration saw."""
    layer = int(path.split(".")[1])
    mixed = small.clone()
    for name, tensor in tiny.tensors().items():
        if name.startswith(f"layers.{layer}."):
            mixed.place(name, tensor)
    return mixed


def test_wanda_keeps_columns_with_large_inputs(tiny: Model) -> None:
    scale = torch.ones(32)
    scale[[3, 17]] = 20.0
    data = spread(scale, tiny)
    small = calibrate(Wanda(data=CODE, sparsity=0.5), tiny, Context(data={"data": data})).model
    gone = small.module("layers.0.attention.q").weight == 0
    assert float(gone[:, [3, 17]].float().mean()) < 0.1
    plain = pruned(Magnitude(sparsity=0.5), tiny)
    assert float((plain.module("layers.0.attention.q").weight == 0)[:, [3, 17]].float().mean()) > 0.3


def test_wanda_on_equal_inputs_is_magnitude_by_row() -> None:
    w = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    method = Wanda(data=CODE, sparsity=0.3)
    assert torch.equal(method.mask(w.abs() * torch.full((20,), 7.0)), lowest(w.abs(), 6))


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_wanda_patterns_are_exact_and_survive_quantization(pattern: str, tiny: Model) -> None:
    small = calibrated(Wanda(data=CODE, pattern=pattern), tiny)  # type: ignore[arg-type]
    rw = Rewriter(small)
    RTN(bits=4, group=16, scheme="asymmetric").rewrite(rw)
    n, m = map(int, pattern.split(":"))
    for path in Wanda(data=CODE).targets(tiny):
        for w in (small.module(path).weight, rw.module(path).dense()):
            assert bool(((w.view(w.shape[0], -1, m) != 0).sum(-1) <= n).all())


def test_experts_are_scored_by_their_own_tokens(mixture: Model) -> None:
    small = calibrated(Wanda(data=CODE, sparsity=0.5, select=("moe.experts",)), mixture)
    for name in ("gate", "up", "down"):
        w = small.module(f"layers.0.moe.experts.{name}").weight
        assert bool(((w == 0).sum(-1) == w.shape[-1] // 2).all())


def influences(model: Model, data: Sequences) -> list[float]:
    """1 - mean cos(in, out) of each layer, in float64 from the states at the first norm of each."""
    states: list[Tensor] = []
    paths = [f"layers.{i}.norm1" for i in range(model.layers)] + ["norm"]
    handles = [
        model.module(p).register_forward_pre_hook(lambda _, args: states.append(args[0].double()))
        for p in paths
    ]
    outputs(model, data.ids)
    for handle in handles:
        handle.remove()
    return [1 - float(torch.cosine_similarity(a, b, dim=-1).mean()) for a, b in pairwise(states)]


def test_depth_removes_the_layers_of_least_influence(tiny: Model) -> None:
    for name in ("attention.o", "mlp.down"):
        tiny.module(f"layers.2.{name}").weight.data.mul_(0.01)
    data = Sequences(tiny)
    outcome = calibrate(Depth(data=CODE, keep=4), tiny, Context(data={"data": data}))
    known = influences(tiny, data)
    scores = list(outcome.measures["scores"].values())
    assert scores == pytest.approx(known, rel=1e-4)
    gone = sorted(range(6), key=lambda layer: known[layer])[:2]
    assert 2 in gone
    kept = [layer for layer in range(6) if layer not in gone]
    for new, old in enumerate(kept):
        mine = outcome.model.module(f"layers.{new}.mlp.up").weight
        assert torch.equal(mine, tiny.module(f"layers.{old}.mlp.up").weight)


def test_of_equal_layers_the_later_goes() -> None:
    model = filled(blank(layers=4))
    for name, tensor in model.tensors().items():
        if name.endswith(("attention.o.weight", "mlp.down.weight")):
            model.place(name, torch.zeros_like(tensor))
    outcome = calibrate(Depth(data=CODE, keep=50 / 100), model, Context(data={"data": Sequences(model)}))
    assert outcome.log[0].detail == "4 -> 2: 0-1"


@pytest.mark.parametrize(("keep", "kept"), [(0.75, 5), (2, 2), (0.1, 1), (0.5, 3)])
def test_keep_is_a_share_or_a_count(keep: float, kept: int) -> None:
    assert Depth(data=CODE, keep=keep).kept(6) == kept


def words(method: Magnitude | Wanda | Depth, model: Model) -> str:
    return "\n".join(d.render() for d in method.refuses(model, ()))


def test_what_cannot_be_is_refused_with_what_can(tiny: Model) -> None:
    bare = on_meta(tiny)
    assert "keep between 1 and 5 layers, e.g. keep = 4" in words(Depth(data=CODE, keep=6), bare)
    assert "leaves 6 of 6 layers" in words(Depth(data=CODE, keep=1.0), bare)
    assert "means 50%, not 30%" in words(Magnitude(pattern="2:4", sparsity=0.3), bare)
    assert "no meaning for a pattern n:m" in words(Magnitude(pattern="2:4", scope="global"), bare)
    assert "a table that is looked up has none" in words(Wanda(data=CODE, select=("embedding",)), bare)
    with pytest.raises(ValueError, match="less than 1"):
        Magnitude(sparsity=1.0)


def test_inputs_that_no_group_divides_are_refused() -> None:
    model = blank(layers=1)
    model.module("layers.0.mlp").up = type(model.module("layers.0.mlp.up"))(in_features=30, out_features=48)
    said = words(Magnitude(pattern="2:4"), model)
    assert "error[E324]" in said
    assert "divisible by 4; layers.0.mlp.up has 30" in said
    assert "use pattern = unstructured" in said


def test_a_gradient_runs_from_the_first_layer_to_the_last(tiny: Model) -> None:
    slope = Gradient(0.2, 0.8)
    by_size = pruned(Magnitude(sparsity=slope), tiny)
    by_input = calibrated(Wanda(data=CODE, sparsity=slope), tiny)
    for layer in range(tiny.layers):
        path, share = f"layers.{layer}.mlp.up", slope.at(layer, tiny.layers)
        rows, inputs = tiny.module(path).get_parameter("weight").shape
        assert zeros(by_size, path) == int(share * rows * inputs + 1e-9)
        assert zeros(by_input, path) == rows * int(share * inputs + 1e-9)
    assert slope.at(0, tiny.layers) == 0.2
    assert slope.at(tiny.layers - 1, tiny.layers) == pytest.approx(0.8)


def test_a_rule_sets_one_number_in_place_of_a_gradient(tiny: Model) -> None:
    method = Magnitude(sparsity=Gradient(0.2, 0.8), rules=(Rule(on="layers[1].mlp.up", sparsity=0.4),))
    applied = method.targets(tiny)
    assert applied["layers.1.mlp.up"].share == 0.4
    assert applied["layers.0.mlp.up"].share == 0.2
    told = {words for _, _, words in selector_report(method, tiny)}
    assert told == {f"sparsity = {how}, pattern = unstructured" for how in ("0.2 to 0.8", "0.4")}


def test_gradients_that_mean_nothing_are_refused(tiny: Model) -> None:
    with pytest.raises(ValueError, match="both ends"):
        Magnitude(sparsity=Gradient(0.2, 1.0))
    assert "takes one sparsity" in words(Magnitude(sparsity=Gradient(0.2, 0.8), scope="global"), tiny)
    assert "means 50%" in words(Magnitude(sparsity=Gradient(0.2, 0.8), pattern="2:4"), tiny)
