"""Learners in place of modules: what runs, what is learned in which phase, what it costs, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from effc.compiler.blocks.acm import ACM, dense
from effc.compiler.cost import count
from effc.compiler.exporter import inexpressible
from effc.compiler.isolation import isolation
from effc.compiler.method import Context
from effc.compiler.model import Model
from effc.compiler.op_graph import evaluate, expand
from effc.compiler.rewrite import Rewriter
from effc.compiler.spent import counting
from effc.passes.adaptive.acm import Adaptive, worth
from effc.passes.quantize.rtn import RTN
from effc.passes.tie.recursive import Recursive
from effc.runtime.fit import fit
from effc.runtime.generate import generate
from effc.runtime.stage import run_stage
from effc.specs.recipe import Ref
from tests.compiler.conftest import DECODERS, fill

from .skipped import stepped
from .tiny_models import Sequences, blank, filled, outputs

CODE = Ref("code")
IDS = torch.randint(0, 48, (3, 9), generator=torch.Generator().manual_seed(4))


def method(**more: Any) -> Adaptive:
    return Adaptive.model_validate({"data": CODE, "steps": 1, "batch": 2} | more)


def learning(model: Model, spread: float = 3.0, **more: Any) -> Model:
    """The model with untrained learners, whose gates choose all numbers there are."""
    chosen = method(**more)
    rw = Rewriter(model, "adaptive.acm")
    chosen.outline(rw, [])
    chosen.begin(rw, 0)
    out = rw.done()
    for _, unit in out.units():
        if isinstance(unit, ACM):
            weight = unit.choose_out.weight
            drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(unit.out_features))
            unit.choose_out.weight = torch.nn.Parameter(drawn * spread, requires_grad=False)
    return out


@pytest.fixture(params=DECODERS)
def family(request: pytest.FixtureRequest) -> Model:
    model = fill(DECODERS[request.param]())
    if request.param == "mixtral":
        pytest.skip("its feed-forward blocks are mixtures")
    return model


def test_learners_1_to_k_inclusive_are_the_masked_sum_of_all(family: Model) -> None:
    model = learning(family)
    seen: set[int] = set()
    for _, unit in model.units():
        if not isinstance(unit, ACM):
            continue
        x = torch.randn(2, 17, unit.in_features, generator=torch.Generator().manual_seed(1))
        k = unit.scores(x).argmax(-1)
        seen |= set(k.flatten().tolist())
        assert int(k.min()) >= unit.fewest
        got = unit(x)
        torch.testing.assert_close(got, dense(unit, x, k), rtol=1e-5, atol=1e-5)
        sums = unit.sums(x.flatten(0, 1))[torch.arange(34), k.flatten()]
        torch.testing.assert_close(got.flatten(0, 1), sums, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(evaluate(expand(unit), unit, x, None)[0], got, rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]
        assert not bool(got[k == 0].any())
    assert seen == {0, 1, 2, 3, 4}


def test_learners_cost_what_the_module_cost(family: Model) -> None:
    model = learning(family, budget=1.0)
    units = [u for _, u in model.units() if isinstance(u, ACM)]
    gates = sum(u.choose_in.flops(0) + u.choose_out.flops(0) for u in units)
    old, new = count(family, 8), count(model, 8)
    assert new.flops_per_token <= old.flops_per_token + gates
    assert new.flops_per_token >= 0.93 * (old.flops_per_token + gates)
    assert new.kv_bytes_per_token == old.kv_bytes_per_token
    half = learning(family, budget=0.5)
    learned = sum(u.learners * u.learner_flops() for u in units)
    assert abs(new.flops_per_token - count(half, 8).flops_per_token - learned / 2) <= len(units)


def test_operations_are_counted_learner_by_learner(family: Model) -> None:
    model = learning(family)
    units = {p: u for p, u in model.units() if isinstance(u, ACM)}
    taken: dict[str, int] = {}
    handles = [
        u.register_forward_pre_hook(
            lambda m, a, p=p: taken.__setitem__(p, int(m.scores(a[0]).argmax(-1).sum()))
        )
        for p, u in units.items()
    ]
    outputs(model, IDS)
    for handle in handles:
        handle.remove()
    with counting(model, 8) as found:
        outputs(model, IDS)
    fixed = count(model, 8).flops_per_token - sum(u.flops(8) for u in units.values())
    learned = sum(taken[p] * u.learner_flops() for p, u in units.items())
    assert found.flops == 27 * fixed + learned


def test_it_generates_as_it_reads(family: Model) -> None:
    model = learning(family)
    steps, _ = stepped(model, IDS, first=3)
    torch.testing.assert_close(steps, outputs(model, IDS), rtol=1e-4, atol=1e-4)
    rows = [IDS[0], IDS[1, :4]]
    ids = torch.stack([torch.cat((torch.zeros(9 - len(r), dtype=torch.int64), r)) for r in rows])
    mask = torch.stack([torch.arange(9) >= 9 - len(r) for r in rows])
    together = generate(model, ids, mask, max_new_tokens=5)
    for row, prompt in zip(together, rows, strict=True):
        assert row[9:].tolist() == generate(model, prompt[None], max_new_tokens=5)[0, len(prompt) :].tolist()


def test_a_token_decides_for_itself() -> None:
    found = isolation(learning(filled(blank(layers=2))))
    assert found.isolated, found.leaks


def test_labels_are_the_least_number_that_is_enough() -> None:
    errors = torch.tensor(
        [[8.0, 4.0, 2.0, 1.0], [8.0, 4.0, 3.9, 1.0], [8.0, 7.9, 2.0, 1.0], [8.0, 4.0, 2.0, 1.9]]
    )
    assert worth(errors, 1.2).tolist() == [3, 1, 0, 2]


def test_each_phase_moves_what_it_trains(tiny: Model) -> None:
    context = Context(data={"data": Sequences(tiny)})
    moved = {}
    for phase, given in (
        ("distil", {"distil": 1.0, "gating": 0.0}),
        ("gates", {"distil": 0.0, "gating": 1.0}),
        ("whole", {"distil": 0.0, "gating": 0.0}),
    ):
        trained = method(**given)
        assert trained.turn(0) == phase
        rw = Rewriter(tiny, "adaptive.acm")
        trained.outline(rw, [])
        trained.begin(rw, context.seed)
        start, end = rw.done().tensors(), fit(trained, tiny, context).model.tensors()
        moved[phase] = {n.split(".")[-2] for n in start if not torch.equal(start[n], end[n])}
    assert moved["distil"] == {"learners_in", "learners_out"}
    assert moved["gates"] <= {"choose_in", "choose_out"}
    assert moved["gates"]
    assert moved["whole"] >= {"learners_in", "learners_out", "choose_out", "norm1", "embedding"}
    order = [method(steps=10).turn(s) for s in range(10)]
    assert order == ["distil"] * 5 + ["gates"] * 2 + ["whole"] * 3


def test_the_report_has_the_share_that_ran(tiny: Model) -> None:
    found = fit(method(), tiny, Context(data={"data": Sequences(tiny)})).measures
    assert set(found["shares"]) == {p for p in found["shares"] if "mlp" in p or "attention" in p}
    assert len(found["shares"]) == 30
    assert 0 <= found["cost"] <= 1
    assert found["flops_spent"] > 0


def test_a_draw_has_the_gradient_of_its_gate() -> None:
    unit = ACM(in_features=4, out_features=4, learners=2, hidden=3)
    for name, tensor in list(unit.named_parameters()):
        path, _, slot = name.rpartition(".")
        value = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2))
        setattr(unit.get_submodule(path), slot, torch.nn.Parameter(value))
    torch.manual_seed(0)
    unit.train()
    y = unit(torch.randn(5, 4, generator=torch.Generator().manual_seed(3)))
    (told,) = unit.told
    assert told.sum(-1).tolist() == [1.0] * 5
    y.square().sum().backward()
    assert unit.choose_out.weight.grad is not None
    assert bool(unit.choose_out.weight.grad.any())


def test_an_export_in_the_family_s_layout_is_refused(tiny: Model) -> None:
    assert inexpressible(learning(tiny))
    small = run_stage(RTN(bits=8, select=("head",)), [learning(tiny)], Context()).model
    assert small.generate(IDS, max_new_tokens=2).shape == (3, 11)


def problems(given: Adaptive, model: Model) -> list[tuple[str, str]]:
    return [(p.code, p.title) for p in given.refuses(model)]


def test_modules_that_cannot_be_replaced_are_refused(tiny: Model, mixture: Model) -> None:
    packed = run_stage(RTN(bits=8), [tiny], Context()).model
    assert problems(method(), packed)[0][0] == "E323"
    tied = run_stage(Recursive(loops=2), [tiny], Context()).model
    assert problems(method(), tied)[0][0] == "E341"
    (found,) = problems(method(learners=5), tiny)
    assert found[0] == "E331"
    assert "48 channels" in found[1]
    assert problems(method(targets=("ffn",)), mixture)[0][0] == "E320"
    assert problems(method(), learning(tiny))[0][0] == "E323"


@pytest.mark.parametrize(
    "wrong",
    [
        {"budget": 0.0},
        {"budget": 1.1},
        {"budget": 0.2},
        {"error_factor": 1.0},
        {"targets": ("mlp",)},
        {"targets": ()},
        {"distil": 0.9, "gating": 0.2},
        {"learners": 1},
        {"tau": 0.0},
    ],
)
def test_arguments_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        method(**wrong)


def test_a_block_without_learners_is_none() -> None:
    for given in (
        {"learners": 0, "hidden": 4},
        {"learners": 2, "hidden": 0},
        {"learners": 2, "hidden": 4, "fewest": 3},
    ):
        with pytest.raises(ValueError, match="none is left"):
            ACM(in_features=4, out_features=4, **given)
