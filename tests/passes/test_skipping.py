"""Layers that some tokens skip: by a schedule, or because a token has left. What holds for both."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from effc.compiler.blocks import MLP, MoE, Unit
from effc.compiler.blocks.exit import Exit
from effc.compiler.blocks.schedule import Schedule
from effc.compiler.blocks.skipping import SkipAttention, SkipMLP
from effc.compiler.contract import EXACT, HEALED
from effc.compiler.cost import cache_bytes, count
from effc.compiler.exporter import inexpressible
from effc.compiler.isolation import isolation
from effc.compiler.method import Context, Method
from effc.compiler.model import Model
from effc.compiler.op_graph import evaluate, expand
from effc.compiler.ops_adaptive import LEFT, confidence, depths
from effc.compiler.rewrite import Rewriter
from effc.compiler.spent import counting
from effc.passes.adaptive._exits import chances, costs, exits_in, targets
from effc.passes.adaptive.early_exit import EarlyExit
from effc.passes.adaptive.skipdecode import SkipDecode
from effc.passes.moe.upcycle import Upcycle
from effc.passes.quantize.rtn import RTN
from effc.runtime.fit import fit
from effc.runtime.generate import generate
from effc.runtime.smaller import smaller
from effc.runtime.stage import run_stage
from effc.specs.recipe import Ref

from .skipped import DENSE, deep, exiting, stepped
from .tiny_models import Sequences, blank, filled, outputs

IDS = torch.randint(0, 48, (3, 12), generator=torch.Generator().manual_seed(5))
CODE = Ref("code")


def scheduled(model: Model, **more: Any) -> Model:
    method = SkipDecode.model_validate(
        {"max_layers": 1.0, "min_layers": 2, "horizon": 8, "prompt": "scheduled"} | more
    )
    return run_stage(method, [model], Context()).model


MAKERS: dict[str, Callable[[Model], Model]] = {"schedule": scheduled, "exits": exiting}


@pytest.fixture(params=DENSE)
def family(request: pytest.FixtureRequest) -> Model:
    return deep(request.param)


@pytest.fixture(params=MAKERS)
def skipping(request: pytest.FixtureRequest, family: Model) -> Model:
    return MAKERS[request.param](family)


def left(model: Model, ids: Tensor) -> Tensor:
    step = model.step(ids)
    with torch.no_grad():
        model(ids, step=step)
    return step.sides[LEFT]


# ---- what both do


def test_token_by_token_is_the_whole_at_once(skipping: Model) -> None:
    whole = outputs(skipping, IDS)
    for first in (1, 5):
        steps, _ = stepped(skipping, IDS, first)
        torch.testing.assert_close(steps, whole, rtol=1e-4, atol=1e-4)


def test_blocks_are_their_ops(skipping: Model) -> None:
    """With and without padding, on what reaches each block, one of several states of the sides."""
    for mask in (None, torch.tensor([[0] * 4 + [1] * 8, [1] * 12, [0] * 1 + [1] * 11])):
        step, plain = skipping.step(IDS, mask), skipping.step(IDS, mask)
        x, y = IDS, IDS
        values: dict[Any, tuple[Tensor, Tensor]] = {}
        for node in skipping.gm.graph.nodes:
            if node.op == "placeholder":
                values[node] = (x, y)
                continue
            if node.op == "output":
                break
            (x, y), *rest = (values[a] for a in node.all_input_nodes if a.name != "step")
            if node.op == "call_function":
                values[node] = (x + rest[0][0], y + rest[0][1])
                continue
            block = skipping.module(str(node.target))
            assert isinstance(block, Unit)
            x = block(x, step) if block.takes_step else block(x)
            y, _ = evaluate(expand(block), block, y, plain)
            real = slice(None) if mask is None or x.dtype != torch.float32 else mask.bool()
            torch.testing.assert_close(y[real], x[real], rtol=1e-4, atol=1e-4)
            values[node] = (x, y)


def test_a_padded_batch_is_its_rows_alone(skipping: Model) -> None:
    """Rows of other lengths and depths, read and generated together and alone."""
    rows = [IDS[0, :9], IDS[1, :4], IDS[2, :6]]
    ids = torch.stack([torch.cat((torch.zeros(9 - len(r), dtype=torch.int64), r)) for r in rows])
    mask = torch.stack([torch.arange(9) >= 9 - len(r) for r in rows])
    together = generate(skipping, ids, mask, max_new_tokens=8)
    for row, prompt in zip(together, rows, strict=True):
        alone = generate(skipping, prompt[None], max_new_tokens=8)
        assert row[9:].tolist() == alone[0, len(prompt) :].tolist()


@pytest.mark.parametrize("made_by", MAKERS)
def test_no_row_depends_on_another(made_by: str) -> None:
    found = isolation(MAKERS[made_by](deep("llama")))
    assert found.isolated, found.leaks
    assert {phase.partition(",")[0] for phase in found.phases} == {"prefill", "decode"}


@pytest.mark.parametrize("made_by", MAKERS)
def test_other_stages_keep_what_skips(made_by: str) -> None:
    model = MAKERS[made_by](filled(blank()))
    small = run_stage(RTN(bits=8, select=("mlp", "attention", "head")), [model], Context()).model
    assert [type(u) for _, u in small.units() if isinstance(u, SkipAttention | SkipMLP)]
    assert small.generate(IDS, max_new_tokens=4).shape == (3, 16)
    torch.testing.assert_close(stepped(small, IDS)[0], outputs(small, IDS), rtol=1e-3, atol=1e-3)
    assert inexpressible(model)
    mixed = run_stage(Upcycle(experts=2, every=1), [model], Context()).model
    assert sum(isinstance(u, MoE) for _, u in mixed.units()) == sum(type(u) is MLP for _, u in model.units())
    torch.testing.assert_close(outputs(mixed, IDS), outputs(model, IDS), rtol=1e-4, atol=1e-4)
    model.architecture = ""
    assert bool(torch.isfinite(outputs(smaller(model).materialize(), IDS)).all())


# ---- the schedule


def test_the_schedule_falls_as_the_formula_says() -> None:
    n = depths(torch.arange(14), 24, 6, 9)
    assert n.tolist() == [round(24 - 18 * min(t / 9, 1)) for t in range(14)]
    assert depths(torch.arange(6), 6, 3, 4).tolist() == [6, 5, 5, 4, 3, 3]  # 5.25, 4.5, 3.75; halves go up


def test_layers_that_run_are_nested_and_the_last_ones(family: Model) -> None:
    method = SkipDecode(max_layers=6, min_layers=2, horizon=8, warmup=1)
    reach = [method.reach(layer, 6) for layer in range(6)]
    before = set(range(6))
    for t in range(12):
        runs = {layer for layer in range(6) if reach[layer] is None or t < (reach[layer] or 0)}
        n = int(depths(torch.tensor(t), 6, 2, 8))
        assert runs == {0, *range(6 - (n - 1), 6)}
        assert runs <= before
        before = runs


@pytest.mark.parametrize("prompt", ["full", "scheduled"])
def test_exact_where_all_layers_run(family: Model, prompt: str) -> None:
    same = scheduled(family, min_layers=1.0, prompt=prompt)
    assert torch.equal(outputs(same, IDS), outputs(family, IDS))
    late = scheduled(family, horizon=10**6, prompt=prompt)
    assert float((outputs(late, IDS) - outputs(family, IDS)).abs().max()) <= 1e-5
    assert generate(late, IDS, max_new_tokens=6).tolist() == generate(family, IDS, max_new_tokens=6).tolist()
    assert SkipDecode(max_layers=1.0, min_layers=1.0).contract.fidelity == EXACT
    assert SkipDecode().contract.fidelity == HEALED


def test_no_key_is_missing_and_the_cache_is_as_predicted(family: Model) -> None:
    model = scheduled(family)
    for tokens in (2, 6, 12):
        _, cache = stepped(model, IDS[:, :tokens])
        assert cache.bytes == 3 * cache_bytes(model, tokens)
    assert count(model).state_bytes > 0
    assert cache_bytes(model, 12) < cache_bytes(family, 12)


def test_operations_counted_are_those_of_the_formula(family: Model) -> None:
    model = scheduled(family)
    with counting(model, 64) as whole:
        outputs(model, IDS[:, :8])
    with counting(model, 64) as steps:
        stepped(model, IDS[:, :8])
    units = sum(1 for _ in model.units())
    for found in (whole, steps):
        assert abs(found.flops_per_token - count(model, 64).flops_per_token) <= units
        assert found.depth == sum(depths(torch.arange(8), 6, 2, 8).tolist()) / 8
    with counting(family, 64) as plain:
        outputs(family, IDS)
    assert plain.flops_per_token == count(family, 64).flops_per_token
    assert plain.depth == 6


def test_a_prompt_runs_whole_where_it_shall() -> None:
    base = deep("llama")
    model = scheduled(base, prompt="full", max_layers=1.0, min_layers=2, horizon=8)
    got, cache = stepped(model, IDS, first=10)
    torch.testing.assert_close(got[:, :10], outputs(base, IDS[:, :10]))
    assert not torch.allclose(got[:, 10:], outputs(base, IDS)[:, 10:])
    bound = cache_bytes(base, 12) * 3
    assert cache.bytes < bound
    with counting(model, 0) as found:
        stepped(model, IDS, first=10)
    assert found.depth == (10 * 6 + 2 * 2) / 12


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [
        ({"max_layers": 7}, "E331", "above the 6 layers"),
        ({"min_layers": 2, "warmup": 2}, "E331", "leaves no layer"),
        ({"max_layers": 2, "min_layers": 0.9}, "E325", "would rise from 2 to 5"),
    ],
)
def test_schedules_that_cannot_be_are_refused(
    given: dict[str, Any], code: str, words: str, tiny: Model
) -> None:
    (problem,) = SkipDecode.model_validate(given).refuses(tiny)
    assert problem.code == code
    assert words in problem.title
    assert problem.help


@pytest.mark.parametrize(
    "given", [{"max_layers": 3, "min_layers": 4}, {"horizon": 0}, {"decay": "cosine"}, {"min_layers": 0}]
)
def test_arguments_that_make_no_sense_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        SkipDecode.model_validate(given)
    with pytest.raises(ValueError, match="no schedule"):
        Schedule(most=3, least=4, horizon=1)


@pytest.mark.parametrize("method", [SkipDecode(), EarlyExit(data=CODE, steps=1)], ids=["schedule", "exits"])
def test_models_that_cannot_skip_are_refused(method: Method, tiny: Model) -> None:
    from tests.compiler.conftest import bert, mixtral

    for model, code, words in [
        (bert(), "E320", "needs a decoder"),
        (mixtral(), "E320", "dense feed-forward"),
        (scheduled(tiny), "E325", "skip tokens already"),
    ]:
        found = method.refuses(model, [])
        assert [p.code for p in found] == [code]
        assert words in found[0].title
        assert found[0].notes


# ---- exits


@pytest.mark.parametrize("heads", ["own", "shared"])
def test_closed_gates_are_the_model_itself(family: Model, heads: str) -> None:
    method = EarlyExit.model_validate({"data": CODE, "steps": 1, "heads": heads})
    rw = Rewriter(family, method.kind)
    method.outline(rw, [])
    method.begin(rw, 0)
    model = rw.done()
    assert float((outputs(model, IDS) - outputs(family, IDS)).abs().max()) <= 1e-5
    assert bool((left(model, IDS) == -1).all())
    assert generate(model, IDS, max_new_tokens=5).tolist() == generate(family, IDS, max_new_tokens=5).tolist()
    more = count(model).params - count(family).params
    exit_ = model.module("layers.1.exit")
    assert isinstance(exit_, Exit)
    own = 0 if heads == "shared" else count(model).params and exit_.head.weight.numel()
    norm = sum(t.numel() for t in exit_.norm.parameters())
    assert more == 2 * (own + norm + 5)


def test_tokens_leave_at_different_depths_with_the_answer_they_had(family: Model) -> None:
    model = exiting(family)
    gone = left(model, IDS)
    assert set(gone.flatten().tolist()) == {-1, 0, 1}
    assert len({tuple(row.tolist()) for row in gone}) == 3
    seen: dict[int, Tensor] = {}
    for number, unit in enumerate(exits_in(model).values()):
        unit.register_forward_pre_hook(lambda _, args, n=number: seen.__setitem__(n, args[0]))
    out = outputs(model, IDS)
    behind = getattr(model.gm, "softcap", lambda z: z)
    for number, unit in enumerate(exits_in(model).values()):
        torch.testing.assert_close(out[gone == number], behind(unit.logits(seen[number][gone == number])))


def test_a_stream_stays_as_it_was_once_its_token_left() -> None:
    """And keys and values of later layers are those of that stream."""
    model = exiting(deep("llama"))
    states: list[Tensor] = []
    for layer in range(1, 6):
        norm = model.module(f"layers.{layer}.norm1")
        norm.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    gone = left(model, IDS)
    first = states[1]  # of layer 2, behind the first exit
    for state in states[2:]:
        assert torch.equal(state[gone == 0], first[gone == 0])
        assert not torch.equal(state[gone == -1], first[gone == -1])


def test_operations_are_counted_and_not_guessed(family: Model) -> None:
    """From who left where: layers, exits and the head that each token went through."""
    model = exiting(family)
    gone = left(model, IDS)
    with counting(model, 9) as found:
        outputs(model, IDS)
    flops = costs(model, 9) * count(model, 9).flops_per_token
    at = torch.where(gone < 0, 2, gone)
    assert found.flops_per_token == pytest.approx(float(flops[at].mean()), rel=1e-5)
    depth = torch.tensor([2.0, 4.0, 6.0])[at].mean()
    assert found.depth == pytest.approx(float(depth))
    assert found.flops_per_token < count(model, 9).flops_per_token
    with counting(model, 9) as steps:
        stepped(model, IDS)
    assert steps.depth == pytest.approx(found.depth)


def test_chances_sum_to_one_and_follow_the_formula() -> None:
    g = [torch.tensor([0.3, 0.9, 0.0]), torch.tensor([0.5, 0.4, 0.2]), torch.tensor([0.6, 0.1, 0.1])]
    p = chances(g)
    torch.testing.assert_close(p.sum(0), torch.ones(3))
    torch.testing.assert_close(p[:, 0], torch.tensor([0.3, 0.5, 0.2, 0.0]))
    torch.testing.assert_close(p[:, 1], torch.tensor([0.9, 0.1, 0.0, 0.0]))


def test_a_gate_should_open_from_the_best_exit_on() -> None:
    surprise = torch.tensor([[1.0, 3.0, 2.0], [0.9, 1.0, 2.0], [0.1, 0.9, 2.0]])
    due = targets(surprise, torch.tensor([0.2, 0.5, 1.0]), 0.7)
    assert due.tolist() == [[0.0, 0.0, 1.0], [0.0, 1.0, 1.0]]
    assert targets(surprise, torch.tensor([0.2, 0.5, 1.0]), 10.0).tolist() == [[1.0] * 3] * 2


def test_features_of_a_gate_by_hand() -> None:
    z = torch.tensor([[0.0, torch.log(torch.tensor(3.0)), -1e4, -1e4]])
    want = [0.75, (0.75 * 0.28768 + 0.25 * 1.38629) / 1.38629, 0.5, (0.9 * 0.10536 + 0.1 * 2.30259) / 1.38629]
    torch.testing.assert_close(confidence(z, power=2.0)[0], torch.tensor(want), rtol=1e-4, atol=1e-4)


def test_turns_train_what_they_say(tiny: Model) -> None:
    method = EarlyExit(data=CODE, steps=4, batch=2, warmup=1, switch_every=1)
    assert [method.turn(s) for s in range(5)] == ["warmup", "gates", "heads", "gates", "heads"]
    context = Context(data={"data": Sequences(tiny)})
    runs = [fit(method.model_copy(update={"steps": n}), tiny, context) for n in (1, 2, 3)]
    names = [n for n in runs[0].model.tensors() if ".exit." in n]
    moved = [
        {n.split(".")[3] for n in names if not torch.equal(a.model.tensors()[n], b.model.tensors()[n])}
        for a, b in pairwise(runs)
    ]
    assert all(torch.equal(t, runs[2].model.tensors()[n]) for n, t in tiny.tensors().items())
    assert "gate" in moved[0] or "gate" in moved[1]
    assert {"depth", "left", "flops_spent", "flops_expected"} <= runs[2].measures.keys()
    assert runs[2].measures["depth"] <= 6


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [({"every": 6}, "E331", "leaves none before the last"), ({"every": 9}, "E331", "leaves none")],
)
def test_exits_that_cannot_be_are_refused(given: dict[str, Any], code: str, words: str, tiny: Model) -> None:
    (problem,) = EarlyExit.model_validate({"data": CODE, "steps": 1} | given).refuses(tiny)
    assert problem.code == code
    assert words in problem.title


def test_a_head_that_is_packed_is_refused_and_so_is_a_negative_cost(tiny: Model) -> None:
    small = run_stage(RTN(bits=8, select=("head",)), [tiny], Context()).model
    assert [p.code for p in EarlyExit(data=CODE, steps=1).refuses(small)] == ["E323"]
    for wrong in ({"lambda_cost": -0.1}, {"threshold": 0.0}, {"power": 1.0}, {"every": 0}):
        with pytest.raises(ValueError, match="validation error"):
            EarlyExit.model_validate({"data": CODE, "steps": 1} | wrong)
    with pytest.raises(ValueError, match="nothing to be sure of"):
        Exit(width=4, classes=1, number=0)
